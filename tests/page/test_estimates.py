"""Intervals against SciPy's and against resampling."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import binomtest

from elf_fast.page import estimates


@pytest.mark.parametrize("k, n", [(0, 8), (3, 8), (8, 8), (470, 500)])
def test_shares_have_clopper_and_pearsons_interval(k, n):
    hits = torch.arange(n) < k
    theirs = binomtest(k, n).proportion_ci(0.95, "exact")
    found = estimates.share(hits, torch.ones(n).double())
    assert found == pytest.approx((k / n, theirs.low, theirs.high))


def test_weights_widen_the_interval_and_zero_weights_leave_samples_out():
    hits = torch.arange(200) % 4 > 0
    even = estimates.share(hits, torch.ones(200).double())
    weight = torch.where(torch.arange(200) < 20, 10.0, 1.0).double()
    uneven = estimates.share(hits, weight)
    assert uneven.high - uneven.low > 1.2 * (even.high - even.low)
    half = estimates.share(hits, (torch.arange(200) < 100).double())
    assert half == pytest.approx(estimates.share(hits[:100], torch.ones(100).double()))
    assert estimates.share(hits, torch.zeros(200).double()) is None
    assert estimates.mean(hits.double(), torch.zeros(200).double()) is None


def test_the_interval_of_a_mean_is_that_of_a_bootstrap():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(400, generator=generator).double()
    weight = torch.where(values > 0.6, 3.0, 1.0).double()
    found = estimates.mean(values, weight)
    rows = torch.randint(400, (4000, 400), generator=generator)
    means = (weight[rows] * values[rows]).sum(1) / weight[rows].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    assert found.value == pytest.approx(means.mean().item(), abs=2e-3)
    assert (found.low, found.high) == pytest.approx((low, high), abs=6e-3)
