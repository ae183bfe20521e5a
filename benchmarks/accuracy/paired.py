"""Differences between paired runs, with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

LEAST_SEEDS = 3


class Difference(NamedTuple):
    """The mean of paired differences and its 95% confidence interval."""

    mean: float
    low: float
    high: float


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Mean of ours[i] - theirs[i] with Student's interval, mean -+ t_{0.975, n-1} s / sqrt(n), for
    n pairs whose differences have the sample standard deviation s.

    Raises:
        ValueError: not as many of one as of the other, or fewer than LEAST_SEEDS.
    """
    n = len(ours)
    if n != len(theirs) or n < LEAST_SEEDS:
        raise ValueError(
            f"ours, theirs: expected as many values, at least {LEAST_SEEDS}, "
            f"got {n} and {len(theirs)}"
        )
    values = np.subtract(ours, theirs)
    half = stdtrit(n - 1, 0.975) * values.std(ddof=1) / math.sqrt(n)
    mean = values.mean()
    return Difference(float(mean), float(mean - half), float(mean + half))
