"""Engines whose samples carry an identity, and engines whose stages take given times."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.serving_simulation import Clock, TimedEngine
from elf_fast import ELF
from elf_fast.inference import Engine, compile
from elf_fast.inference.stage_times import interpolated

#: Width of the identity: a sample is a number below 2**BITS in signs of its features.
BITS = 17
#: Neighbours get different signs, so that they leave at different exits.
SPREAD = 77773


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


class FakeEngine(TimedEngine):
    """Stages that take milliseconds `base[e] + each[e] * n`."""

    def __init__(self, clock: Clock, base: list[float], each: list[float], max_batch: int) -> None:
        #: As `Scheduler` takes them.
        self.times = {
            n: [b + a * n for b, a in zip(base, each, strict=True)] for n in (1, max_batch)
        }
        super().__init__(clock, interpolated(self.times, max_batch))
