"""Tests whether a drop in accuracy holds on new data of the same kind.

Learn then test (Angelopoulos et al., arXiv 2110.01052), for exits as in "Fast yet Safe" (Jazbec et
al., arXiv 2405.20915): candidates from cautious to risky are tested in this order, each at level
1 - guarantee, up to the first that fails. The order is fixed before the test data is seen, so the
last candidate that passed drops more than allowed with a probability of at most 1 - guarantee.

The loss of a sample is 1 if only the last exit is right ("harm"), -1 if only the exit that it takes
is right ("gain"), else 0; its mean is the drop. The bounds of Hoeffding and Bentkus, which those
papers use, need losses in [0, 1], so `p_value` is another: see there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

#: The share of 1 - guarantee that may be spent on bounding how many samples harm or gain.
_NUISANCE = 0.25


class Outcome(NamedTuple):
    """How the samples fare at one candidate, beside exits off. Numbers, or arrays of one shape."""

    harms: Any
    gains: Any
    samples: Any


def p_value(outcome: Outcome, drop: float, level: float) -> Any:
    """A p-value at `level` of the hypothesis that the drop is larger than `drop`: if it is, then
    P(p <= level) <= level.

    Let d be the share of samples that harm or gain. With probability 1 - a it is at most d_max, the
    upper end of Clopper and Pearson's interval from D = harms + gains. Given D, harms are binomial
    with probability q. A drop d (2 q - 1) > drop needs q > (1 + drop / d_max) / 2, so the lower
    tail of that binomial, plus a, is a p-value: Berger and Boos, "P values maximized over a
    confidence set for the nuisance parameter", JASA 1994. Here a is a quarter of the level.
    """
    from scipy.special import betainc, betaincinv  # type: ignore[import-untyped]

    a = _NUISANCE * level
    harms, gains, n = (np.asarray(x, np.float64) for x in outcome)
    D = harms + gains
    d_max = np.where(n > D, betaincinv(D + 1, np.maximum(n - D, 1), 1 - a), 1.0)
    q = (1 + drop / d_max) / 2
    # With q above 1 so large a drop is impossible.
    tail = np.where(gains > 0, betainc(np.maximum(gains, 1), harms + 1, 1 - np.minimum(q, 1)), 1.0)
    tail = np.where(q > 1, 0.0, tail)
    return np.minimum(1.0, tail + a)


def samples_needed(drop: float, level: float) -> int:
    """The fewest samples with which a drop can be certified: if no sample harms."""
    if drop >= 1:
        return 1
    return math.ceil(math.log(_NUISANCE * level) / math.log1p(-drop)) if drop > 0 else 2**62


class Limit(NamedTuple):
    """A drop that must hold, on all samples or on those of a group."""

    drop: float
    outcome: Outcome  # arrays [P], for each candidate from cautious to risky


def certified(limits: Sequence[Limit], guarantee: float) -> Any:
    """How many candidates, from the first on, hold all limits with probability `guarantee`. Of
    outcomes with more dimensions [P, ...]: an array [...].

    A candidate fails if one of the limits fails. No correction for several limits is needed: a
    candidate that breaks one of them passes the test of that one with probability 1 - guarantee.
    """
    level = 1 - guarantee
    passed = [p_value(limit.outcome, limit.drop, level) <= level for limit in limits]
    return np.cumprod(np.logical_and.reduce(passed), axis=0).sum(0)
