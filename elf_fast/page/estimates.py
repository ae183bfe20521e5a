"""Numbers with their 95% intervals."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

LEVEL = 0.95
_ERRORS = 1.959964  # standard errors in half of a 95% interval


class Estimate(NamedTuple):
    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> Estimate:
        """All three times a positive factor."""
        return Estimate(*(factor * number for number in self))


def share(hits: Tensor, weight: Tensor) -> Estimate | None:
    """The weighted share of hits [N] bool, with Clopper and Pearson's interval (Biometrika 26,
    1934); None if no sample has weight.

    For unequal weights [N] the interval is that of (sum w)^2 / sum w^2 samples (Kish, Survey
    Sampling, 1965), an approximation.
    """
    from scipy.special import betaincinv  # type: ignore[import-untyped]

    total = weight.sum().item()
    if not total > 0:
        return None
    p = (weight * hits).sum().item() / total
    n = total**2 / weight.square().sum().item()
    k, tail = p * n, (1 - LEVEL) / 2
    low = 0.0 if k <= 0 else float(betaincinv(k, n - k + 1, tail))
    high = 1.0 if k >= n else float(betaincinv(k + 1, n - k, 1 - tail))
    return Estimate(p, min(low, p), max(high, p))  # p itself may have been rounded


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
