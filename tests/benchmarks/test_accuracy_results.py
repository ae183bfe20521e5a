"""The results file: its order, a line that was cut short, and damage."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("torchmetrics")

from accuracy_helpers import RUNS, brief_record

from benchmarks.accuracy import results
from benchmarks.accuracy.run import missing


def test_the_file_is_sorted_whatever_the_order(tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    for r in RUNS:
        results.add(r, brief_record(), one)
    for r in reversed(RUNS):
        results.add(r, brief_record(), two)
    results.add(RUNS[0], brief_record(seconds=9.0), two)  # the first record stays
    assert one.read_bytes() == two.read_bytes()
    assert sorted(RUNS) == list(results.load(one))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.jsonl", "two.jsonl"]


def test_a_torn_last_line_is_done_again(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    for r in RUNS:
        results.add(r, brief_record(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    last = sorted(RUNS)[-1]
    assert missing(RUNS, path) == [last]
    assert f"{path}:3: cut short" in capsys.readouterr().err
    results.add(last, brief_record(), path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda lines: ["{", *lines], ":1: expected the record of a run, got '{"),
        (lambda lines: ['{"run": {"loss": "ce"}}', *lines], ":1: expected the record of a run"),
        (lambda lines: [*lines, lines[0]], ":4: expected one record a run, got a second of ce"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, damage, message):
    path = tmp_path / "results.jsonl"
    for r in RUNS:
        results.add(r, brief_record(), path)
    path.write_text("\n".join(damage(path.read_text().splitlines())) + "\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        results.load(path)
