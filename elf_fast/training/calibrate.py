"""Choosing the threshold of the exits on validation data.

One threshold is swept over all exits. The rule: the one that is most accurate on validation, of
equally accurate ones the cheapest; where FLOPs are limited, among those within the limit. The
cheapest that is as accurate as never leaving early sounds as good, but chosen among eighty by a few
validation images it was a point less accurate on test (docs/accuracy.md). Test data plays no part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..flops import Flops
from ..modes import mode
from ..reference import ELF, statistic

#: Confidences, or margins, that are tried: from 0, where all leave at once, to never leaving early.
THRESHOLDS = (*(k / 100 for k in range(100)), 0.995, 0.999, math.inf)


def candidates(criterion: str) -> tuple[float, ...]:
    """The thresholds to try, from the boldest to never leaving early."""
    if criterion == "entropy":
        return (*(round(1 - t, 3) for t in THRESHOLDS[:-1]), -math.inf)
    return THRESHOLDS


class ExitTable(NamedTuple):
    """What every exit says of every sample, so that a sweep runs the network once."""

    confidence: Tensor  # [E, N] the criterion's statistic
    correct: Tensor  # [E, N] bool
    criterion: str = "confidence"

    def exit_index(self, threshold: float) -> Tensor:
        """[N] the exit that each sample takes at one common threshold."""
        t = torch.tensor(threshold, dtype=self.confidence.dtype)
        leaves = self.confidence <= t if self.criterion == "entropy" else self.confidence >= t
        leaves[-1] = True
        return leaves.int().argmax(0)


class OperatingPoint(NamedTuple):
    threshold: float
    accuracy: float  # in [0, 1]
    flops: float  # per sample


@torch.inference_mode()
def exit_table(model: ELF, batches: Iterable[tuple[Tensor, Tensor]]) -> ExitTable:
    """Every exit's confidence and correctness for batches of images [n, ...] and targets [n]; of
    no batches, as a rank may have, a table of N = 0."""
    device = model.thresholds.device
    temperatures = [*model.temperatures, torch.tensor(1.0)]
    E = len(model.stages)
    confidence, correct = [torch.empty(E, 0)], [torch.empty(E, 0, dtype=torch.bool)]
    with mode(model, training=False):
        for x, y in batches:
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            logits = []
            for stage, head in zip(model.stages, model.heads, strict=True):
                x = stage(x)
                logits.append(head(x))
            pairs = zip(logits, temperatures, strict=True)
            found = torch.stack([statistic(z, T, model.criterion) for z, T in pairs])
            confidence.append(found.cpu())
            correct.append(torch.stack([z.argmax(1) == y for z in logits]).cpu())
    return ExitTable(torch.cat(confidence, 1), torch.cat(correct, 1), model.criterion)


def sweep(
    table: ExitTable, flops: Flops, thresholds: Sequence[float] | None = None
) -> list[OperatingPoint]:
    """Accuracy and FLOPs at each threshold (None: the `candidates`)."""
    points = []
    for threshold in candidates(table.criterion) if thresholds is None else thresholds:
        exit_index = table.exit_index(threshold)
        correct = table.correct.gather(0, exit_index[None])
        accuracy = correct.double().mean().item()
        exit_counts = torch.bincount(exit_index, minlength=len(table.correct)).tolist()
        points.append(OperatingPoint(threshold, accuracy, flops.mean(exit_counts)))
    return points


def choose(points: Sequence[OperatingPoint], max_flops: float = math.inf) -> OperatingPoint:
    """The most accurate point of at most `max_flops` per sample; of equally accurate ones the one
    with the fewest FLOPs, then the last: `sweep` goes from bold to cautious. A limit below the
    first exit's FLOPs is taken as these."""
    limit = max(max_flops, min(p.flops for p in points))
    affordable = (p for p in reversed(points) if p.flops <= limit)
    return max(affordable, key=lambda p: (p.accuracy, -p.flops))
