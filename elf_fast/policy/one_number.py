"""Choosing the thresholds of the exits on validation data.

A sweep moves all thresholds together with one number. The rule takes the number that is most
accurate on validation, and the cheapest of equally accurate ones. If FLOPs are limited, it takes
only numbers within the limit. Another rule took the cheapest number that is as accurate as no early
exit. With few validation images and eighty thresholds to choose from, its test accuracy was a point
lower (docs/accuracy.md). Test data is not used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..base import ELFBase
from ..criteria import Criterion, find
from ..flops import Flops
from .exit_table import ExitTable

#: For distances between log-odds, thresholds count as at least this far from the range's ends.
_EDGE = 1e-6


class OperatingPoint(NamedTuple):
    threshold: float  # see `moved_to`
    accuracy: float  # in [0, 1]
    flops: float  # per sample


def moved_to(value: float, thresholds: Tensor, criterion: Criterion) -> Tensor:
    """`thresholds` [E-1] or [E-1, C] moved together to `value`; their shape stays.

    Equal thresholds all become `value`. Unequal ones keep their distances, with `value` as their
    centre: distances between log-odds for a criterion with bounds, log((t - low) / (high - t)), and
    plain differences for one without. A threshold that is off stays off, unless all are.
    If `value` is an end of the range, or off, all thresholds that are on become `value`.
    """
    checks.threshold_values("value", value, criterion)
    on = thresholds.isfinite()
    known = thresholds[on].double()
    if not known.numel() or bool((known == known[0]).all()) or math.isinf(value):
        moved = torch.full_like(thresholds, value)
    elif criterion.is_bounded:
        span = criterion.high - criterion.low
        inside = ((thresholds.double() - criterion.low) / span).clamp(_EDGE, 1 - _EDGE)
        centre = inside.new_tensor((value - criterion.low) / span)
        odds = inside.logit() - inside[on].logit().mean() + centre.logit()
        moved = (criterion.low + span * odds.sigmoid()).to(thresholds)
    else:
        limits = torch.finfo(thresholds.dtype)
        moved = thresholds.double() - known.mean() + value
        moved = moved.clamp(limits.min, limits.max).to(thresholds)
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
        values: from the least to the most cautious; None: those of `Criterion.candidates`.
        thresholds: [E-1] or [E-1, C], usually the model's, whose distances stay: see `moved_to`.
            None: all thresholds are equal.
    """
    E, N = table.statistic.shape
    if not N:
        raise ValueError("table: expected at least one sample, got none")
    if thresholds is None:
        thresholds = torch.zeros(E - 1, device="cpu")
    if thresholds.dim() not in (1, 2) or len(thresholds) != E - 1:
        raise ValueError(
            f"thresholds: expected [{E - 1}] or [{E - 1}, C], got {checks.describe(thresholds)}"
        )
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
    """The most accurate point of at most `max_flops` per sample. Of equally accurate points: the
    one with the fewest FLOPs, and then the last, the most cautious one of a `sweep`. A limit below
    the first exit's FLOPs is raised to them."""
    if not points or math.isnan(max_flops):
        raise ValueError(
            f"points, max_flops: expected points and a number, got {len(points)} and {max_flops}"
        )
    limit = max(max_flops, min(p.flops for p in points))
    affordable = (p for p in reversed(points) if p.flops <= limit)
    return max(affordable, key=lambda p: (p.accuracy, -p.flops))


def set_threshold(model: ELFBase, value: float) -> None:
    """Moves the thresholds of a model to `value`: see `moved_to`."""
    model.thresholds = moved_to(value, model.thresholds, find(model.criterion))
