"""`Row`: the verdict, the text and the JSON of a comparison."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.row import EARLIER_NAMES, HEADING, Row, closest, counts
from elf_fast.timing import Quartiles

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def row(median: float, least: float | None, *, low: float = 0.0, high: float = 9.0, **other) -> Row:
    needs = {"subject": Quartiles(2500.0, 2400.0, 2600.0), "baseline": Quartiles(9.0, 8.0, 10.0)}
    return Row("kernels", "ours", "theirs", "[2, 3]", Quartiles(median, low, high), least, needs,
               **other)  # fmt: skip


@pytest.mark.parametrize(
    "median, high, least, holds",
    [
        (2.0, 2.1, 2.0, True),
        (1.99, 2.1, 2.0, False),  # only for "no worse" the upper quartile is enough
        (0.97, 1.0, 1.0, True),
        (0.97, 0.99, 1.0, False),
        (0.1, 0.1, None, None),
    ],
)
def test_verdicts(median, high, least, holds):
    assert row(median, least, high=high).holds is holds


def test_json_keeps_a_row():
    before = row(1.5, 2.0, unit="MB", bytes=7)
    found = json.loads(json.dumps(before.as_json()))
    assert found["holds"] is False
    assert Row.from_json(found) == before


def test_recorded_results_load():
    suites = json.loads((RESULTS / "cpu-zen4-2-cores.json").read_text())
    recorded = [found for suite in suites.values() for found in suite["rows"]]
    assert len(recorded) > 400
    for found in recorded:
        loaded = Row.from_json(found)
        assert loaded.holds == found["holds"] and list(loaded.ratio) == found["ratio"]
        assert not {loaded.subject, loaded.baseline} & EARLIER_NAMES.keys()


def test_earlier_names_become_those_of_today():
    found = row(1.0, None).as_json()
    loaded = Row.from_json(found | {"baseline": "sceptic"})
    assert (loaded.subject, loaded.baseline) == ("ours", "tuned PyTorch")


def test_rows_with_targets_are_counted_and_sorted():
    rows = [row(3.0, 2.0), row(0.5, None), row(1.0, 4.0), row(0.9, 0.95)]
    assert counts(rows) == (1, 2)
    assert closest(rows) == [rows[2], rows[3], rows[0]]
    assert closest(rows, 1) == [rows[2]]


def test_lines_stand_under_their_headings():
    line = row(3.14159, 2.0, low=3.0, high=3.5).line()
    places = {"theirs": "baseline", "[2, 3]": "shape", "(3..3.5)": "quartiles", ">= 2": "target"}
    for value, heading in places.items():
        assert line.index(value) == HEADING.index(heading)
    assert "3.14 " in line and "holds" in line and line.endswith("2.5 ms")
    assert "MISSED" in row(1.0, 2.0).line()
