"""Choosing the threshold of the exits on validation data.

One threshold is swept over all exits. The rule: of the thresholds that lose no validation accuracy
against never leaving early, take the one that costs the fewest FLOPs. Test data plays no part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..flops import Flops
from ..modes import mode
from ..reference import ELF, statistic

#: Confidences that are tried; inf switches the exits off.
THRESHOLDS = (*(round(0.20 + 0.01 * k, 2) for k in range(80)), 0.995, 0.999, math.inf)


class ExitTable(NamedTuple):
    """What every exit says of every sample, so that a sweep runs the network once."""

    confidence: Tensor  # [E, N] the criterion's statistic
    correct: Tensor  # [E, N] bool

    def exit_index(self, threshold: float) -> Tensor:
        """[N] the exit that each sample takes at one common threshold (criterion "confidence")."""
        leaves = self.confidence >= torch.tensor(threshold, dtype=self.confidence.dtype)
        leaves[-1] = True
        return leaves.int().argmax(0)


class OperatingPoint(NamedTuple):
    threshold: float
    accuracy: float  # in [0, 1]
    flops: float  # per sample


@torch.inference_mode()
def exit_table(model: ELF, images: Tensor, targets: Tensor, batch_size: int = 256) -> ExitTable:
    """Every exit's confidence and correctness for images [N, ...] and targets [N].

    Raises:
        ValueError: the model's criterion is not "confidence".
    """
    if model.criterion != "confidence":
        raise ValueError(f'criterion: expected "confidence", got {model.criterion!r}')
    temperatures = [*model.temperatures, torch.tensor(1.0)]
    confidence, correct = [], []
    with mode(model, training=False):
        for x, y in zip(images.split(batch_size), targets.split(batch_size), strict=True):
            logits = []
            for stage, head in zip(model.stages, model.heads, strict=True):
                x = stage(x)
                logits.append(head(x))
            pairs = zip(logits, temperatures, strict=True)
            confidence.append(torch.stack([statistic(z, T) for z, T in pairs]))
            correct.append(torch.stack([z.argmax(1) == y for z in logits]))
    return ExitTable(torch.cat(confidence, 1), torch.cat(correct, 1))


def sweep(
    table: ExitTable, flops: Flops, thresholds: Sequence[float] = THRESHOLDS
) -> list[OperatingPoint]:
    """Accuracy and FLOPs at each threshold."""
    points = []
    for threshold in thresholds:
        exit_index = table.exit_index(threshold)
        correct = table.correct.gather(0, exit_index[None])
        accuracy = correct.double().mean().item()
        exit_counts = torch.bincount(exit_index, minlength=len(table.correct)).tolist()
        points.append(OperatingPoint(threshold, accuracy, flops.mean(exit_counts)))
    return points


def choose(points: Sequence[OperatingPoint]) -> OperatingPoint:
    """The cheapest point at least as accurate as never leaving early (threshold inf); of equally
    cheap ones the most accurate, then the highest threshold."""
    never = [p.accuracy for p in points if p.threshold == math.inf]
    if not never:
        raise ValueError("points: expected one with threshold inf to compare with, got none")
    safe = [p for p in points if p.accuracy >= never[0]]
    return min(safe, key=lambda p: (p.flops, -p.accuracy, -p.threshold))
