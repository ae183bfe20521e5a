"""Comparisons over settings, and the verdicts on them."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("torchmetrics")

from accuracy_helpers import records
from scipy import stats

from benchmarks.accuracy import comparisons, runs
from benchmarks.accuracy.paired import Difference

BEST = {"point": "best"}


@pytest.fixture
def keep() -> comparisons.Comparison:
    """Of 4 points at 70% of the FLOPs."""
    made = records((100, "ce", "conv"), {"plain": 0.0, "keep": 4.0})
    (found,) = comparisons.compare(made, "keep", "plain", **BEST)
    return found


def test_a_comparison_is_over_the_seeds(keep):
    assert keep.setting == (100, "ce", "conv")
    assert keep.seeds == runs.SEEDS
    assert keep.accuracy == pytest.approx((73.0, 69.0))
    # The gain is 0.1 above and below 4 with every second seed: s = 0.1 sqrt(10 / 9).
    half = stats.t.ppf(0.975, 9) * 0.1 * math.sqrt(10 / 9) / math.sqrt(10)
    assert keep.difference == pytest.approx((4.0, 4.0 - half, 4.0 + half))
    assert keep.flops_share == pytest.approx(0.7)


def test_settings_with_few_common_seeds_are_left_out_and_the_worst_comes_first():
    made = {
        **records((100, "ce", "conv"), {"plain": 0, "keep": 4}),
        **records((50, "ce", "conv"), {"plain": 0, "keep": 1}, seeds=range(3)),
        **records((10, "ce", "conv"), {"plain": 0}),
        **records((10, "ce", "conv"), {"keep": 1}, seeds=range(2)),
    }
    found = comparisons.compare(made, "keep", "plain", **BEST)
    assert [(c.setting.imbalance, len(c.seeds)) for c in found] == [(50, 3), (100, 10)]


@pytest.mark.parametrize(
    "low, high, flops, verdict",
    [
        (3.0, 4.1, 0.7, "holds"),
        (2.9, 4.1, 0.7, "open"),
        (1.0, 3.0, 0.7, "open"),
        (1.0, 2.9, 0.7, "fails"),
        (3.5, 4.1, 0.804, "holds"),  # the limit allows for rounding to whole percents
        (3.5, 4.1, 0.81, "fails"),
    ],
)
def test_the_claim_is_judged_by_the_whole_interval(keep, low, high, flops, verdict):
    difference = Difference((low + high) / 2, low, high)
    changed = keep._replace(difference=difference, flops_share=flops)
    assert comparisons.claim(changed) == verdict


@pytest.mark.parametrize(
    "low, high, verdict",
    [
        (-0.5, 0.9, "none"),
        (-0.4, -0.1, "none"),
        (-2, -0.1, "some"),
        (-2, 0, "open"),
        (-2, 1, "open"),
    ],
)
def test_the_harm_of_dropping_is_judged_by_the_whole_interval(low, high, verdict):
    assert comparisons.harm(Difference((low + high) / 2, low, high)) == verdict


def test_the_table_is_apart_from_other_variants_heads_and_seeds():
    made = {
        **records((100, "ce", "conv"), {"plain": 0, "keep": 4, "drop": -2, "stay": 1}),
        **records((100, "ce", "deep"), {"plain": 0, "keep": 5}),
        **records((100, "ce", "conv"), {"plain": 0, "stay": 0.5}, seeds=runs.NEW_SEEDS),
    }

    def found(of):
        return [(c.ours, c.setting.head, round(c.difference.mean, 2), len(c.seeds))
                for c in of(made, **BEST)]  # fmt: skip

    assert found(comparisons.in_table) == [("drop", "conv", -2.0, 10), ("keep", "conv", 4.0, 10)]
    assert found(comparisons.tried) == [("keep", "deep", 5.0, 10), ("stay", "conv", 1.0, 10)]
    assert found(comparisons.again) == [("stay", "conv", 0.5, 20)]


def test_all_settings_together_count_a_seed_once():
    made = records((100, "ce", "conv"), {"plain": 0.0, "keep": 4.0})
    assert comparisons.together(made, "keep", "plain", **BEST) is None
    made |= records((50, "ce", "conv"), {"plain": 0.0, "keep": 1.0})
    made |= records((10, "ce", "conv"), {"plain": 0.0, "keep": 9.0}, seeds=range(9))
    settings, difference = comparisons.together(made, "keep", "plain", **BEST)
    assert settings == 2
    assert difference.mean == pytest.approx(2.5)
    # Both settings vary alike with the seed, so their average has the interval of one of them.
    one = comparisons.compare(made, "keep", "plain", **BEST)[0].difference
    assert difference.high - difference.low == pytest.approx(one.high - one.low)


def test_all_settings_together_by_head():
    made = {
        **records((100, "ce", "conv"), {"plain": 0.0, "keep": 4.0}),
        **records((50, "ce", "conv"), {"plain": 0.0, "keep": 1.0}),
        **records((100, "ce", "pooled"), {"plain": 0.0, "keep": -7.0}),
        **records((100, "ce", "deep"), {"plain": 0.0, "keep": 99.0}),  # not of the table
    }

    def mean(*heads: str):
        found = comparisons.together(made, "keep", "plain", **BEST, heads=heads)
        return found and (found[0], pytest.approx(found[1].mean))

    assert mean(*runs.HEADS) == (3, -2 / 3)
    assert mean("conv") == (2, 2.5)
    assert mean("pooled") is None
