"""The parts of a network that run between two exit tests.

Part e maps features [n, ...] to features and to what exit e reads: logits [n, C], or the features
of which `ops.exit_head_into` computes the logits.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import checks, ops
from ..agreement import are_close
from ..heads import ExitHead
from ..modes import mode
from ..modules import ELF, is_fusable

__all__ = [
    "Example",
    "Part",
    "different_rows",
    "example_rows",
    "examples",
    "parts_of",
]


class Part(nn.Module):
    """Stage e, and its head or what the head computes before pool and classifier.

    Returns a tuple: the features (not for the last part), and then the head's input, unless the
    head reads the features themselves.
    """

    def __init__(self, stage: nn.Module, head: nn.Module, *, is_last: bool) -> None:
        super().__init__()
        self.stage = stage
        self.is_last = is_last
        #: Weight [C, D] and bias [C] of the classifier that the exit's kernel computes.
        self.classifier: tuple[Tensor, Tensor | None] | None = None
        self.head = head
        if not is_last and isinstance(head, ExitHead) and is_fusable(head):
            bias = head.classifier.bias
            self.classifier = (
                head.classifier.weight.detach().clone(),
                None if bias is None else bias.detach().clone(),
            )
            self.head = head.stem

    @property
    def exit_reads_features(self) -> bool:
        return self.classifier is not None and isinstance(self.head, nn.Identity)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stage(x)
        if self.exit_reads_features:
            return (x,)
        return (self.head(x),) if self.is_last else (x, self.head(x))


class Example(NamedTuple):
    """A part on example values."""

    x: Tensor  # [n, ...] the input, in the memory format that the part gets
    results: tuple[Tensor, ...]  # what the part returns for x
    #: Strides of the next part's input (None: there is no next part).
    next_strides: tuple[int, ...] | None = None


def parts_of(model: ELF) -> list[Part]:
    """The model's parts, in evaluation mode, with copies of its modules and weights.

    Raises:
        ValueError: a later stage or head has a BatchNorm without running statistics.
    """
    last = len(model.stages) - 1
    parts = []
    with mode(model, training=False):
        if not model.drops_exited:
            raise ValueError(
                "model: expected results that do not depend on the other samples of the batch, "
                "got a BatchNorm without running statistics after the first exit"
            )
        # Copied in here, because networks make what they need in evaluation in their `train()`.
        for e, pair in enumerate(zip(model.stages, model.heads, strict=True)):
            stage, head = copy.deepcopy(pair)
            part = Part(stage, head, is_last=e == last).requires_grad_(False)
            part.training = False
            parts.append(part)
    return parts


@torch.no_grad()
def examples(parts: list[Part], x: Tensor) -> list[Example]:
    """Every part on the features that x [n, ...] gives, n >= 2. Nobody leaves.

    Raises:
        ValueError: a part gives another result for fewer samples: it mixes samples.
    """
    found: list[Example] = []
    for e, part in enumerate(parts):
        x = _as_part_wants(part, x)
        given = x.clone(memory_format=torch.preserve_format)
        results = part(given)
        _check_agreement(e, part(x[:1].clone(memory_format=torch.preserve_format)), results, 1)
        if e:
            found[-1] = found[-1]._replace(next_strides=tuple(ops.batch_strides(x)))
        found.append(Example(x, results))
        x = results[0]
    return found


def example_rows(x: Tensor, n: int) -> Tensor:
    """n samples like x, in its memory format, which code may overwrite."""
    rows = torch.arange(n) % len(x)
    return ops.empty_batch(x, n).copy_(x[rows.to(x.device)])


def different_rows(x: Tensor, n: int) -> Tensor:
    """n samples like those of x [N, ...], all different, so that a part which mixes samples shows.
    The first is that of x."""
    rows = example_rows(x, n)
    if not x.is_floating_point():
        return torch.stack([row.roll(i, -1) if row.dim() else row for i, row in enumerate(rows)])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(rows.shape, generator=generator).to(rows)
    noise[0] = 0
    scale = x.double().std().nan_to_num(0).item() if x.numel() > 1 else 0.0
    return rows.add_(noise * (scale or 1.0))


def _as_part_wants(part: Part, x: Tensor) -> Tensor:
    """x with its samples dense in memory; images for convolutions are channels-last."""
    if x.dim() == 4 and any(isinstance(m, nn.Conv2d) for m in part.modules()):
        return x.contiguous(memory_format=torch.channels_last)
    return x if checks.samples_are_dense(x) else x.contiguous()


def _check_agreement(
    e: int, found: tuple[Tensor, ...] | list[Tensor], expected: tuple[Tensor, ...], n: int
) -> None:
    """Compares the results of n samples with the first n of a larger batch."""
    for ours, theirs in zip(found, expected, strict=True):
        if not are_close(ours, theirs[:n]):
            raise ValueError(
                f"model: stages[{e}] or heads[{e}] gives other results for {n} samples than for "
                "the same samples in a larger batch, so exited samples cannot be dropped"
            )
