"""The section of a CPU in docs/performance.md: misses come first, and every row is in it."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")
from page_helpers import plots, row, tables

from benchmarks.pages import cpu

INFERENCE = [
    row("inference", "elf_fast", "oracle", "net, N = 64, s = 0.5", 0.98, 0.97),
    row("inference", "elf_fast", "sceptic", "net, N = 64, s = 0.5", 0.9),
    row("inference", "elf_fast", "padded", "net, N = 64, s = 0.5", 0.995),
    row("inference", "elf_fast", "oracle", "net, N = 16, s = 0.5", 0.9),
]
KERNELS = [
    row("kernels", "gate", "copy", "logits [2, 3]", 0.8),
    row("kernels", "gate", "read-only pass", "logits [2, 3]", 0.7),
    row("kernels", "gate", "reference", "logits [2, 3]", 4.0, 5.0),
]
GROWTH = [row("growth", "elf_fast", "full", "net, N = 8", 1.5)]


@pytest.fixture
def lines(tmp_path):
    found = {
        "inference": {"environment": {"commit": "1"}, "rows": INFERENCE},
        "growth": {"environment": {"commit": "2"}, "rows": GROWTH},
        "kernels": {"environment": {"commit": "1"}, "rows": KERNELS},
    }
    return cpu.page("cpu-some", found, tmp_path)


def test_suites_are_named_with_their_environment(lines):
    assert [line for line in lines if line.startswith("- ")] == [
        "- inference, kernels: commit 1", "- growth: commit 2",
    ]  # fmt: skip


def test_missed_targets_come_first(lines):
    found = tables(lines)
    assert list(found)[:2] == ["Missed", "Behind, without a target"]
    assert found["Missed"] == [
        ["gate", "reference", "logits [2, 3]", "4", "3.99 to 4.01", ">= 5", "**missed**", "20 us"]
    ]
    assert any(line.startswith("1 of 2 ") for line in lines)


def test_rows_that_are_behind_stand_beside_a_baseline_that_can_be_beaten(lines):
    """Not the limits, not the oracle, and no row whose upper quartile reaches 1."""
    assert [cells[:2] for cells in tables(lines)["Behind, without a target"]] == [
        ["elf_fast", "tuned PyTorch"]
    ]


@pytest.mark.parametrize(
    "suite, rows", [("inference", INFERENCE), ("kernels", KERNELS), ("growth", GROWTH)]
)
def test_every_row_is_there(lines, suite, rows):
    shown = [(cells[2], float(cells[3])) for cells in tables(lines)[f"All rows: {suite}"]]
    assert shown == [(row["shape"], row["ratio"].median) for row in rows]


def test_every_plot_that_is_shown_is_written(lines, tmp_path):
    wanted = {f"performance-cpu-some-{p}.png" for p in ("limits", "efficiency", "growth")}
    assert plots(lines) == wanted == {path.name for path in tmp_path.iterdir()}


def test_nothing_missed_and_nothing_to_plot(tmp_path):
    found = {"kernels": {"environment": {}, "rows": [row("kernels", "a", "b", "c", 2.0, 1.5)]}}
    lines = cpu.page("cpu-some", found, tmp_path)
    assert list(tables(lines)) == ["All rows: kernels"] and not plots(lines)
