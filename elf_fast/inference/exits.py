"""The exits of an engine: the model's live settings, and one operator per exit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import heads, ops, reference
from ..arguments import cpu_scalars, in_arithmetic_of
from ..criteria import Criterion, find
from ..modules import ELF
from .parts import Part

__all__ = ["Exit", "Exits"]

#: (given, rows, outputs): an exit on logits [n, C], or on the features that its classifier reads.
#: rows and outputs, from out_logits to count, are those of `ops.exit_gate_into`.
Exit = Callable[[Tensor, Tensor | None, Sequence[Tensor]], None]


class Exits:
    """Thresholds, temperatures and criterion are the model's at every call; classifiers are the
    parts' own copies.

    After a stage little of Python is in the processor's cache: what takes 15 us in a loop takes 300
    there. So the settings are looked up once per batch, and an exit is one call.
    """

    def __init__(self, model: ELF, parts: Sequence[Part], dtype: torch.dtype) -> None:
        """dtype: of the logits in the output."""
        self._model = model
        self._classifiers = [part.classifier for part in parts]
        self._dtype = dtype
        #: The settings, and the exits with them. Threads replace it as a whole.
        self._made: tuple[tuple[Any, ...], list[Exit]] = ((None, None, None), [])

    def current(self) -> list[Exit]:
        """The exits with the settings that the model has now."""
        buffers, criterion = self._model._buffers, self._model.criterion
        held = buffers["thresholds"], buffers["temperatures"], criterion
        known, exits = self._made
        if any(a is not b for a, b in zip(held, known, strict=True)):
            exits = self._make(held[0], held[1], find(criterion))
            self._made = held, exits
        return exits

    def _make(self, thresholds: Any, temperatures: Any, criterion: Criterion) -> list[Exit]:
        # Views share memory with the settings, so they show what is written there later.
        settings = list(zip(thresholds.unbind(0), temperatures.unbind(0), strict=True))
        never, one = cpu_scalars(criterion.off, 1.0)  # the last exit's
        last = len(self._classifiers) - 1
        return [
            _exit(e, t, T, criterion, classifier, self._dtype, is_last=e == last)
            for e, (classifier, (t, T)) in enumerate(
                zip(self._classifiers, [*settings, (never, one)], strict=True)
            )
        ]


def _exit(
    e: int,
    threshold: Tensor,
    temperature: Tensor,
    criterion: Criterion,
    classifier: tuple[Tensor, Tensor | None] | None,
    dtype: torch.dtype,
    *,
    is_last: bool,
) -> Exit:
    code = criterion.code
    fused = code is not None and dtype != torch.float64
    if fused and classifier is not None and classifier[0].dtype == dtype:
        settings = (*classifier, threshold, temperature, code, is_last, e)

        def head(given: Tensor, rows: Tensor | None, outputs: Sequence[Tensor]) -> None:
            ops.exit_head_into(given, *settings, rows, *outputs)

        return head

    def gate(given: Tensor, rows: Tensor | None, outputs: Sequence[Tensor]) -> None:
        z = given
        if classifier is not None:
            weight, bias = classifier
            z = torch.nn.functional.linear(heads.pool(given).to(weight.dtype), weight, bias)
        if fused and z.dtype == dtype:
            ops.exit_gate_into(z, threshold, temperature, code, is_last, e, rows, *outputs)
            return
        t, T = in_arithmetic_of(z, threshold, temperature)
        found = reference.exit_gate(z, t, temperature=T, criterion=criterion)
        ops.write_leavers(z.to(dtype), found, is_last, e, rows, *outputs)

    return gate
