"""The table of runs and the filters over it."""

from __future__ import annotations

import re

import pytest

from benchmarks.accuracy import runs


@pytest.mark.parametrize(
    "text, message",
    [
        ("los=ce", "expected imbalance|loss|head|variant|seed=value,..., got 'los=ce'"),
        ("seed=3,99", "expected values of seed among 0, 1"),
    ],
)
def test_wrong_filters_are_refused(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        runs.select(runs.table(), [text])


def test_the_table_has_every_run_once():
    table = runs.table()
    assert len(set(table)) == len(table)
    seeds = "seed=" + ",".join(map(str, runs.SEEDS))
    main = runs.select(table, ["variant=plain,keep,drop", "head=conv,pooled", seeds])
    assert len(main) == 3 * 4 * 2 * 3 * 10  # imbalances, losses, heads, variants, seeds
    assert {r.seed for r in runs.select(table, ["variant=keep-margin"])} == set(range(30))
