"""The section of a GPU in docs/performance.md: misses come first, errors and gaps are listed."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("triton")
from page_helpers import plots, row, tables

from benchmarks.pages import gpu

GATE = "[256, 1000] float32, confidence"
NETWORK = "[256, 3, 224, 224] bfloat16, ResNet-50, share 0.5"


@pytest.fixture
def lines(tmp_path):
    found = {
        "environment": {"gpu": "some"},
        "ceilings": {
            "copy": {"median_us": 1.0, "GB/s": 3000.4}, "empty launch": {"median_us": 1.0},
        },
        "rows": [
            row("exit_gate", "exit_gate, called", "eager", GATE, 6.0, 5.0),
            row("exit_gate", "exit_gate, cuda", "empty launch", GATE, 0.9, 1 / 1.3),
            row("exit_gate", "exit_gate, cuda", "torch.compile", GATE, 0.6, 1.5),
            row("exit_gate", "exit_gate, cuda", "plain", GATE, 0.5),
            row("exit_gate", "exit_gate, cuda", "copy", GATE, 0.5, bytes=1024000),
            row("network", "elf_fast", "oracle", NETWORK, 0.91),
            row("network", "elf_fast", "full", NETWORK, 1.25),
        ],
        "errors": [
            {"subject": "exit_gate, triton", "shape": GATE, "error": "ran out of memory"},
            {"subject": "start", "shape": "", "error": "it hung"},
        ],
        "not run": ["exit_loss [1, 2]"],
    }  # fmt: skip
    return gpu.page("gpu-some", found, tmp_path)


def test_the_parts_of_the_section(lines):
    assert list(tables(lines)) == [
        "Missed", "Behind, without a target", "Networks", "Share of copy bandwidth",
        "Targets that hold", "Not measured",
    ]  # fmt: skip
    assert "gpu some" in lines and "copy 3000 GB/s, empty launch 1.00 us." in lines
    assert any(line.startswith("2 of 3 ") for line in lines)


def test_targets_are_missed_or_hold_closest_first(lines):
    found = tables(lines)
    assert [(c[0], c[1], c[3], c[5]) for c in found["Missed"]] == [
        ("exit_gate, cuda", "torch.compile", "0.6", ">= 1.5")
    ]
    assert [(c[1], c[3]) for c in found["Targets that hold"]] == [
        ("empty launch", "0.9"), ("eager", "6"),
    ]  # fmt: skip


def test_slower_rows_without_a_target_are_behind(lines):
    assert [c[1] for c in tables(lines)["Behind, without a target"]] == ["plain"]


def test_a_network_has_one_line_with_all_baselines(lines):
    head = next(line for line in lines if line.startswith("| network |"))
    assert head == "| network | oracle | full | elf_fast needs |"
    assert tables(lines)["Networks"] == [[NETWORK, "0.91", "1.25", "20 us"]]


def test_what_was_not_measured_is_listed(lines):
    listed = lines[lines.index("### Not measured") :]
    assert [line for line in listed if line.startswith("- ")] == [
        f"- exit_gate, triton, {GATE}: ran out of memory", "- start: it hung", "- exit_loss [1, 2]",
    ]  # fmt: skip


def test_the_plot_is_written(lines, tmp_path):
    shown = {"performance-gpu-some-bandwidth.png"}
    assert plots(lines) == shown == {path.name for path in tmp_path.iterdir()}
