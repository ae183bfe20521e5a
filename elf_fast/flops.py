"""Floating-point operations of an ELF, exit by exit, heads included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from . import checks
from .base import ELFBase
from .modes import mode

__all__ = ["Flops", "count_flops"]


class Flops(NamedTuple):
    """Floating-point operations for one sample (a multiplication and an addition are two)."""

    stages: tuple[int, ...]  # [E]
    heads: tuple[int, ...]  # [E]

    @property
    def without_exits(self) -> int:
        """All stages and the last head: the network without exits."""
        return sum(self.stages) + self.heads[-1]

    def leaving_at(self, e: int) -> int:
        """FLOPs of a sample that leaves at exit e (0-based): all stages and heads up to there."""
        return sum(self.stages[: e + 1]) + sum(self.heads[: e + 1])

    def mean(self, exit_counts: Sequence[int]) -> float:
        """Mean FLOPs per sample if exit_counts [E] samples left at each exit."""
        total = sum(n * self.leaving_at(e) for e, n in enumerate(exit_counts))
        return total / sum(exit_counts)


@torch.inference_mode()
def count_flops(model: ELFBase, sample: Tensor) -> Flops:
    """FLOPs of every stage and head, by torch.utils.flop_counter on one sample [1, ...].

    Raises:
        TypeError: `sample` is no tensor. ValueError: it does not hold exactly one sample.
    """
    checks.tensor("sample", sample)
    if sample.dim() < 1 or len(sample) != 1:
        raise ValueError(f"sample: expected one sample [1, ...], got {checks.describe(sample)}")

    def measure(module: nn.Module, x: Tensor) -> tuple[int, Tensor]:
        with FlopCounterMode(display=False) as counter:
            y = module(x)
        return counter.get_total_flops(), y

    stages, heads = [], []
    x = sample
    with mode(model, training=False):
        for stage, head in zip(model.stages, model.heads, strict=True):
            flops, x = measure(stage, x)
            stages.append(flops)
            heads.append(measure(head, x)[0])
    return Flops(tuple(stages), tuple(heads))
