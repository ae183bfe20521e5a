"""The results in short: which comparisons are counted, with which sign and verdict."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("torchmetrics")

from accuracy_helpers import records

from benchmarks.accuracy import runs
from benchmarks.accuracy.summary import Summary, sentences, summarise


@pytest.fixture(scope="module")
def summary() -> Summary:
    return summarise(
        {
            **records((100, "ce", "conv"), {"plain": 0, "keep": 4, "drop": -2, "stay": 1}),
            **records(
                (50, "ldam_drw", "pooled"), {"plain": 0, "keep": 3.6, "drop": 3.4}, flops=0.6
            ),
            **records((10, "ce", "conv"), {"plain": 0, "keep": 1}, seeds=range(2)),
            **records((100, "ce", "deep"), {"plain": 0, "keep": 5, "stay": -1}),
            **records((100, "ce", "conv"), {"plain": 0, "stay": 0.5}, seeds=runs.NEW_SEEDS),
        }
    )


def named(rows) -> list[tuple]:
    return [(c.setting.loss, c.setting.head, c.ours, round(c.difference.mean, 2)) for c in rows]


def test_claims_are_counted_over_the_table(summary):
    assert len(summary.table) == 4
    assert summary.claims == {"holds": 3, "fails": 1}
    assert summary.holding == ["ce", "ldam_drw"]
    assert summary.is_reached


def test_a_claim_that_holds_with_one_loss_is_not_reached():
    summary = summarise(records((100, "ce", "conv"), {"plain": 0, "keep": 4}))
    assert summary.claims == {"holds": 1}
    assert summary.holding == ["ce"]
    assert not summary.is_reached


def test_significant_differences_are_apart_by_sign(summary):
    assert named(summary.worse) == [("ce", "conv", "drop", -2.0)]
    assert named(summary.better) == [
        ("ldam_drw", "pooled", "drop", 3.4), ("ldam_drw", "pooled", "keep", 3.6),
        ("ce", "conv", "keep", 4.0),
    ]  # fmt: skip


def test_differences_around_zero_are_not_significant():
    summary = summarise(records((100, "ce", "conv"), {"plain": 0, "keep": 0.05, "drop": -0.05}))
    assert len(summary.table) == 2
    assert summary.worse == summary.better == []


def test_overall_is_over_the_complete_settings(summary):
    keep, drop = summary.overall["keep"], summary.overall["drop"]
    assert (keep.settings, keep.difference.mean) == (2, pytest.approx(3.8))
    assert (drop.settings, drop.difference.mean) == (2, pytest.approx(0.7))
    assert keep.by_head == drop.by_head == {}  # each kind of head has one setting


def test_overall_by_head():
    summary = summarise(
        {
            **records((100, "ce", "conv"), {"plain": 0, "keep": 4}),
            **records((50, "ce", "conv"), {"plain": 0, "keep": 2}),
            **records((50, "ce", "pooled"), {"plain": 0, "keep": -3}),
        }
    )
    (found,) = summary.overall.values()
    assert found.difference.mean == pytest.approx(1.0)
    assert {head: d.mean for head, d in found.by_head.items()} == {"conv": pytest.approx(3.0)}


def test_dropping_is_compared_with_keeping(summary):
    assert named(summary.dropping) == [
        ("ce", "conv", "drop", -6.0), ("ldam_drw", "pooled", "drop", -0.2),
    ]  # fmt: skip
    assert summary.harms == {"some": 1, "none": 1}
    assert summary.dropping_overall.settings == 2
    assert summary.dropping_overall.difference.mean == pytest.approx(-3.1)


def test_what_else_was_tried(summary):
    assert named(summary.tried) == [
        ("ce", "deep", "keep", 5.0), ("ce", "deep", "stay", -1.0), ("ce", "conv", "stay", 1.0),
    ]  # fmt: skip
    assert named(summary.gaining) == [("ce", "deep", "keep", 5.0), ("ce", "conv", "stay", 1.0)]
    assert named([summary.best_tried]) == [("ce", "deep", "keep", 5.0)]
    assert named(summary.again) == [("ce", "conv", "stay", 0.5)]
    assert len(summary.again[0].seeds) == len(runs.NEW_SEEDS)


def numbers(line: str) -> list[float]:
    return [float(n) for n in re.findall(r"[-+]?\d+(?:\.\d+)?", line)]


def test_sentences_have_the_numbers(summary):
    """In their order, apart from those in names."""
    said = [numbers(line.removeprefix("- ")) for line in sentences(summary)]
    assert said == [
        [3, 80, 4, 3, 0, 1],  # the claim: points, FLOPs; of 4 holds, open, fails
        [1, 4, 100, -2.0],  # worse
        [3, 4, 50, 3.4, 50, 3.6, 100, 4.0],  # better
        [2, 3.8, 3.7, 3.9],  # samples kept, over two settings
        [2, 0.7, 0.6, 0.8],  # samples dropped
        [-0.5, 1, 2, 1, 0],  # dropping: harmless, of, harmful, open
        [2, -3.1, -3.1, -3.1],  # over two settings
        [3, 2, 5.0, 4.9, 5.1, 100],  # tried: gaining, the best
        [100, 0.5, 0.5, 0.5],  # on the new seeds
    ]


@pytest.mark.parametrize("gain, verdict", [(1.0, "reached"), (0.0, "NOT reached")])
def test_the_first_sentence_says_whether_the_claim_is_reached(gain, verdict):
    summary = summarise(
        {
            **records((100, "ce", "conv"), {"plain": 0, "keep": 4}),
            **records((50, "ldam_drw", "pooled"), {"plain": 0, "keep": 3 + gain - 0.5}),
        }
    )
    assert f" is {verdict} " in sentences(summary)[0]


def test_nothing_is_said_of_what_was_not_run():
    summary = summarise(records((100, "ce", "conv"), {"plain": 0, "keep": 4}))
    assert summary.overall == {} and summary.dropping_overall is None
    assert summary.best_tried is None and summary.again == []
    assert len(sentences(summary)) == 4  # the claim, worse, better, dropping
