"""The command that measures the targets on a CPU: its comparisons, its file and its last line."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks.cpu import compare, targets
from benchmarks.row import Row
from elf_fast.timing import Quartiles, Samples


@pytest.fixture
def timed(monkeypatch) -> list[list[str]]:
    """The candidates that were timed together; each call of the i-th candidate takes i + 1 us."""
    groups: list[list[str]] = []

    def sample(candidates, *, seconds):
        groups.append(list(candidates))
        return Samples({name: [f(), 2 * f(), 3 * f()] for name, f in candidates.items()})

    monkeypatch.setattr(compare, "sample", sample)
    return groups


CANDIDATES = {name: lambda i=i: i + 1.0 for i, name in enumerate(("own", "a", "b"))}
PAIRS = [("own", "a", 1.5), ("own", "b", 4.0), ("a", "b", None)]


def test_a_row_for_every_pair(timed, capsys):
    rows = compare.compare("some", "[2, 3]", CANDIDATES, PAIRS)
    assert [(r.subject, r.baseline, r.ratio.median, r.holds) for r in rows] == [
        ("own", "a", 2.0, True), ("own", "b", 3.0, False), ("a", "b", 1.5, None),
    ]  # fmt: skip
    assert rows[0].needs["subject"].median == 2.0
    assert timed == [["own", "a", "b"]]
    assert capsys.readouterr().out.splitlines() == [row.line() for row in rows]


def test_apart_only_candidates_with_the_same_baseline_take_turns(timed):
    compare.compare("some", "[2, 3]", CANDIDATES, PAIRS, apart=True)
    assert timed == [["own", "a"], ["own", "a", "b"]]


def test_other_suites_stay_in_the_file(tmp_path, monkeypatch, capsys):
    row = Row("a", "own", "full", "[1]", Quartiles(2.0, 1.9, 2.1), 1.5,
              {"subject": Quartiles(1.0, 1.0, 1.0)})  # fmt: skip
    monkeypatch.setattr(targets, "SUITES", {"a": lambda full: iter([row]), "b": None})
    monkeypatch.setattr(targets, "sample", lambda *_, **__: None)
    monkeypatch.setattr(targets, "keep_memory", lambda: None)
    output = tmp_path / "results" / "cpu-some.json"
    output.parent.mkdir()
    output.write_text(json.dumps({"a": {"rows": []}, "b": {"rows": [1]}}))
    monkeypatch.setattr(sys, "argv", ["targets", "--suite", "a", "--output", str(output)])
    targets.main()
    found = json.loads(output.read_text())
    assert found["b"] == {"rows": [1]}
    assert [Row.from_json(r) for r in found["a"]["rows"]] == [row]
    assert found["a"]["full"] is False and "commit" in found["a"]["environment"]
    assert capsys.readouterr().out.endswith("\n1 targets hold, 0 are missed\n")
