"""Choosing the thresholds of the exits on validation data.

One number is swept, and all thresholds move together. The rule: the one that is most accurate on
validation, and the cheapest of equally accurate ones; where FLOPs are limited, among those within
the limit. Another rule, the cheapest that is as accurate as never leaving early, was a point less
accurate on test when a few validation images chose among eighty thresholds (docs/accuracy.md). Test
data plays no part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..base import ELFBase
from ..criteria import Criterion, find
from ..flops import Flops
from .exit_table import ExitTable

#: How near to the ends of the range a threshold may count as lying, for its distance to others.
_EDGE = 1e-6


class OperatingPoint(NamedTuple):
    threshold: float  # see `moved_to`
    accuracy: float  # in [0, 1]
    flops: float  # per sample


def moved_to(value: float, thresholds: Tensor, criterion: Criterion) -> Tensor:
    """`thresholds` [E-1] or [E-1, C] moved together to `value`; their shape stays.

    Equal thresholds all become `value`. Unequal ones keep their distances, with `value` as their
    centre: distances between log-odds for a criterion with bounds, log((t - low) / (high - t)), and
    plain differences for one without. One that is off stays off, unless all are. The two ends of
    the sweep, everybody leaves and nobody leaves, hold for all.
    """
    on = thresholds.isfinite()
    known = thresholds[on].double()
    if not known.numel() or bool((known == known[0]).all()) or math.isinf(value):
        moved = torch.full_like(thresholds, value)
    elif criterion.is_bounded:
        span = criterion.high - criterion.low
        inside = ((thresholds.double() - criterion.low) / span).clamp(_EDGE, 1 - _EDGE)
        centre = torch.tensor((value - criterion.low) / span, dtype=torch.float64)
        odds = inside.logit() - inside[on].logit().mean() + centre.logit()
        moved = (criterion.low + span * odds.sigmoid()).to(thresholds)
    else:
        moved = (thresholds.double() - known.mean() + value).to(thresholds)
    return torch.where(on | ~on.any(), moved, thresholds)


def sweep(
    table: ExitTable,
    flops: Flops,
    values: Sequence[float] | None = None,
    *,
    thresholds: Tensor | None = None,
) -> list[OperatingPoint]:
    """Accuracy and FLOPs at each value to which the thresholds are moved.

    Args:
        values: None: those of `Criterion.candidates`, from bold to cautious.
        thresholds: [E-1] or [E-1, C], such as the model's, whose differences stay: see `moved_to`.
            None: equal ones.
    """
    E = len(table.statistic)
    if thresholds is None:
        thresholds = torch.zeros(E - 1)
    if values is None:
        values = table.criterion.candidates(table.statistic[:-1])
    points = []
    for value in values:
        exit_index = table.exit_index(moved_to(value, thresholds.cpu(), table.criterion))
        correct = table.correct.gather(0, exit_index[None])
        accuracy = correct.double().mean().item()
        exit_counts = torch.bincount(exit_index, minlength=E).tolist()
        points.append(OperatingPoint(value, accuracy, flops.mean(exit_counts)))
    return points


def choose(points: Sequence[OperatingPoint], max_flops: float = math.inf) -> OperatingPoint:
    """The most accurate point of at most `max_flops` per sample. Of equally accurate ones the one
    with the fewest FLOPs, then the last: `sweep` goes from bold to cautious. A limit below the
    first exit's FLOPs counts as these."""
    limit = max(max_flops, min(p.flops for p in points))
    affordable = (p for p in reversed(points) if p.flops <= limit)
    return max(affordable, key=lambda p: (p.accuracy, -p.flops))


def set_threshold(model: ELFBase, value: float) -> None:
    """Moves the thresholds of a model to `value`: see `moved_to`."""
    model.thresholds = moved_to(value, model.thresholds, find(model.criterion))
