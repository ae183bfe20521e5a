"""Engines whose samples carry an identity, and a clock that stands still unless it is moved."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from elf_fast import ELF
from elf_fast.inference import Engine, compile
from elf_fast.inference.engine import StageResult

#: Width of the identity: a sample is a number below 2**BITS in signs of its features.
BITS = 17
#: Neighbours get different signs, so that they leave at different exits.
SPREAD = 77773


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Known(nn.Module):
    """A head whose logits are the first features."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : self.classes]


def identities(first: int, n: int) -> Tensor:
    """[n, BITS] features of the samples first, first + 1, ...: signs times a strength that says at
    which exit a sample leaves."""
    numbers = torch.arange(first, first + n)
    spread = numbers * SPREAD % 2**BITS
    signs = 2.0 * ((spread[:, None] >> torch.arange(BITS)) & 1) - 1
    return signs * (0.4 + 0.3 * (numbers % 7)[:, None])


def numbers(logits: Tensor) -> list[int]:
    """The samples that logits [n, BITS] belong to."""
    spread = ((logits > 0).long() << torch.arange(BITS)).sum(1)
    return (spread * pow(SPREAD, -1, 2**BITS) % 2**BITS).tolist()


class Scale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 1.5


def known_model(stages: int = 3) -> ELF:
    """A network whose logits show which sample they are of."""
    return ELF(
        [Scale() for _ in range(stages)], [Known(BITS) for _ in range(stages)],
        thresholds=0.11, criterion="confidence",
    ).eval()  # fmt: skip


def known_engine(max_batch: int = 64) -> tuple[ELF, Engine]:
    model = known_model()
    return model, compile(model, identities(0, 8), engine="eager", max_batch=max_batch)


class FakeEngine:
    """Stages that take milliseconds `base[e] + each[e] * n` on a clock. A sample [1] holds the exit
    at which it leaves."""

    def __init__(self, clock: Clock, base: list[float], each: list[float], max_batch: int) -> None:
        self.max_batch = max_batch
        self.clock, self.base, self.each = clock, base, each
        self.runs: list[tuple[int, int]] = []

    @property
    def stages(self) -> int:
        return len(self.base)

    @property
    def times(self) -> dict[int, list[float]]:
        """Milliseconds, as `Scheduler` takes them."""
        return {
            n: [b + a * n for b, a in zip(self.base, self.each, strict=True)]
            for n in (1, self.max_batch)
        }

    def stage_input(self, e: int, n: int) -> Tensor:
        return torch.empty(n, 1)

    def run_stage(self, e: int, x: Tensor) -> StageResult:
        n = len(x)
        self.runs.append((e, n))
        self.clock.now += (self.base[e] + self.each[e] * n) / 1e3
        kept = (x[:, 0] > e).nonzero().flatten()
        features = None if e == self.stages - 1 else x.clone()
        return StageResult(features, x.clone(), x[:, 0].long(), x[:, 0].clone(), kept)
