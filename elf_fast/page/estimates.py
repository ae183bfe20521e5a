"""Weighted shares and means with their 95% intervals."""

from __future__ import annotations

from torch import Tensor

from ..policy import Estimate
from ..policy.measure import LEVEL, interval

_ERRORS = 1.959964  # standard errors in half of a 95% interval


def share(hits: Tensor, weight: Tensor) -> Estimate | None:
    """The weighted share of hits [N] bool, with Clopper and Pearson's interval; None if no sample
    has weight. For unequal weights [N] the interval is that of (sum w)^2 / sum w^2 samples (Kish,
    Survey Sampling, 1965), an approximation.
    """
    total = weight.sum().item()
    if not total > 0:
        return None
    p = min(1.0, (weight * hits).sum().item() / total)
    n = total**2 / weight.square().sum().item()
    low, high = interval(p * n, n, LEVEL)
    return Estimate(p, float(low), float(high))


def mean(values: Tensor, weight: Tensor) -> Estimate | None:
    """The weighted mean of values [N], with 1.96 standard errors on both sides (of a ratio of two
    sums, linearised, for unequal weights); None if no sample has weight."""
    total = weight.sum()
    if not bool(total > 0):
        return None
    middle = (weight * values).sum() / total
    error = (weight * (values - middle)).square().sum().sqrt() / total
    half = _ERRORS * error.item()
    return Estimate(middle.item(), middle.item() - half, middle.item() + half)
