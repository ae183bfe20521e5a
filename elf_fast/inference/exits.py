"""The exits of an engine: the model's live settings, and one operator per exit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import heads, ops, reference
from ..arguments import cpu_scalars, in_arithmetic_of
from ..base import ELFOutput
from ..criteria import Criterion, find
from ..modules import ELF
from .parts import Part

__all__ = ["Exits"]


class Exits:
    """Thresholds, temperatures and criterion are read from the model at every call; classifiers are
    the parts' own copies."""

    def __init__(self, model: ELF, parts: Sequence[Part]) -> None:
        self._model = model
        self._classifiers = [part.classifier for part in parts]
        self._last = len(parts) - 1
        self._held: tuple[Tensor, Tensor] | None = None
        self._views: list[tuple[Tensor, Tensor]] = []  # threshold [] or [C], temperature [] by exit

    def criterion(self) -> Criterion:
        return find(self._model.criterion)

    def settings(self, e: int, criterion: Criterion) -> tuple[Tensor, Tensor]:
        """Threshold and temperature of exit e. The last one's keep every sample."""
        if e == self._last:
            never, one = cpu_scalars(criterion.off, 1.0)
            return never, one
        held = self._model.thresholds, self._model.temperatures
        if self._held is None or held[0] is not self._held[0] or held[1] is not self._held[1]:
            # Views share memory with the settings, so they show what is written there later.
            views = list(zip(held[0].unbind(0), held[1].unbind(0), strict=True))
            self._views, self._held = views, held
        return self._views[e]

    def run(
        self,
        e: int,
        given: Tensor,
        rows: Tensor | None,
        out: ELFOutput,
        survivors: Tensor,
        next_rows: Tensor,
        count: Tensor,
    ) -> None:
        """Exit e on logits [n, C], or on the features that its classifier reads. Arguments and
        results are those of `ops.exit_gate_into`."""
        criterion, classifier = self.criterion(), self._classifiers[e]
        weight = given if classifier is None else classifier[0]
        threshold, temperature = in_arithmetic_of(weight, *self.settings(e, criterion))
        is_last = e == self._last
        places = (is_last, e, rows, out.logits, out.confidence, out.prediction, out.exit_index,
                  survivors, next_rows, count)  # fmt: skip
        if criterion.score is None and weight.dtype == out.logits.dtype:
            gate = (threshold, temperature, criterion.code, *places)
            if classifier is None:
                ops.exit_gate_into(given, *gate)
            else:
                ops.exit_head_into(given, *classifier, *gate)
            return
        z = given
        if classifier is not None:
            z = torch.nn.functional.linear(heads.pool(given).to(weight.dtype), *classifier)
        found = reference.exit_gate(z, threshold, temperature=temperature, criterion=criterion)
        ops.write_leavers(z.to(out.logits.dtype), found, *places)
