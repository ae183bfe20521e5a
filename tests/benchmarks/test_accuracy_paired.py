"""Paired differences and their intervals."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from benchmarks.accuracy import paired


def test_intervals_are_students():
    rng = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 10, dtype=torch.float64, generator=rng).tolist()
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    got = paired.difference(ours, theirs)
    assert got == pytest.approx((sum(ours) / 10 - sum(theirs) / 10, *expected))
    # by hand: mean 2, s = 1, t_{0.975, 2} = 4.302653, so 2 -+ 4.302653 / sqrt(3)
    assert paired.difference([2, 3, 4], [1, 1, 1]) == pytest.approx((2, -0.484138, 4.484138))
    with pytest.raises(ValueError, match="at least 3, got 3 and 2"):
        paired.difference([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="at least 3, got 2 and 2"):
        paired.difference([1, 2], [1, 2])
