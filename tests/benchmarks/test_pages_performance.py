"""docs/performance.md: misses come first, and nothing that was measured is left out."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

pytest.importorskip("matplotlib")
from benchmarks import row as figure_rows
from benchmarks.gpu import rows as gpu_rows
from benchmarks.pages import gpu as performance_gpu
from benchmarks.pages import performance
from elf_fast.bench.timing import Quartiles


def cpu_row(suite: str, baseline: str, shape: str, ratio: float, least: float | None = None):
    times = {"subject": Quartiles(20.0, 19.0, 21.0), "baseline": Quartiles(20.0, 19.0, 21.0)}
    spread = Quartiles(ratio, ratio - 0.01, ratio + 0.01)
    row = figure_rows.Row(suite, "elf_fast", baseline, shape, spread, least, times)
    return json.loads(json.dumps(asdict(row) | {"holds": row.holds}))


def gpu_row(op: str, candidate: str, settings: dict, **known):
    row = gpu_rows.Row(op, candidate, [256, 1000], "float32", settings, bytes=1024000, **known)
    if row.median_us is not None:
        row.figures = gpu_rows.figures(row, copy_bandwidth=1e6, launch=1.0)
    return asdict(row)


def test_a_page_of_a_cpu(tmp_path):
    rows = [
        cpu_row("inference", "oracle", "net, N = 64, s = 0.5", 0.98, 0.97),
        cpu_row("inference", "sceptic", "net, N = 64, s = 0.5", 0.9),
        cpu_row("kernels", "copy", "logits [2, 3]", 0.8),
        cpu_row("kernels", "reference", "logits [2, 3]", 4.0, 5.0),
        cpu_row("growth", "full", "N = 8", 1.5),
    ]
    found: dict[str, dict] = {}
    for row in rows:
        commit = "2" if row["suite"] == "growth" else "1"
        suite = found.setdefault(row["suite"], {"environment": {"commit": commit}, "rows": []})
        suite["rows"].append(row)
    lines = performance.page("cpu-some", found, tmp_path)
    text = "\n".join(lines)
    assert lines[2:4] == ["- inference, kernels: commit 1", "- growth: commit 2"]
    assert "1 of 2 figures hold." in text
    headings = [line.removeprefix("### ") for line in lines if line.startswith("### ")]
    assert headings[:2] == ["Missed", "Behind, where nothing is asked"]
    assert lines[lines.index("### Missed") + 4].startswith("| elf_fast | reference |")
    behind = text[text.index("### Behind") : text.index("### Share of the limit")]
    assert "| sceptic |" in behind and "| copy |" not in behind and "| oracle |" not in behind
    for row in rows:
        assert f"| {row['baseline']} | {row['shape']} |" in text
    shown = {line.partition("(")[2][:-1] for line in lines if line.startswith("![")}
    assert shown == {f"performance-cpu-some-{p}.png" for p in ("limits", "efficiency", "growth")}
    assert shown == {path.name for path in tmp_path.iterdir()}


def test_a_page_of_a_gpu(tmp_path):
    gate = {"criterion": "confidence"}
    network = {"network": "ResNet-50", "share": 0.5}
    report = {
        "environment": {"gpu": "some"},
        "ceilings": {
            "copy": {"median_us": 1.0, "GB/s": 3000.0}, "empty launch": {"median_us": 1.0}
        },
        "rows": [
            gpu_row("exit_gate", "cuda", gate, median_us=2.0, copy_share=0.5, launches=2.0,
                    times_as_fast_as={"eager": 6.0, "torch.compile": 0.5}),
            gpu_row("exit_gate", "triton", gate, error="ran out of memory"),
            gpu_row("network", "elf_fast", network, median_us=900.0,
                    times_as_fast_as={"oracle": 0.9, "full": 1.25}),
        ],
        "not run": ["exit_loss [1, 2]"],
    }  # fmt: skip
    lines = performance_gpu.page("gpu-some", report, tmp_path)
    text = "\n".join(lines)
    assert "copy 3000 GB/s, empty launch 1.00 us. 1 of 3 figures hold." in text
    assert [line for line in lines if line.startswith("### ")] == [
        "### Missed", "### Slower than something else", "### Networks",
        "### Share of copy bandwidth", "### Figures that hold", "### Not measured",
    ]  # fmt: skip
    missed = text[text.index("### Missed") : text.index("### Slower")]
    assert "| times as fast as torch.compile | >= 1.5 | 0.50 |" in missed
    assert "| time in empty launches | <= 1.3 | 2.00 |" in missed
    assert "| 0.50 | torch.compile | exit_gate cuda, [256, 1000] float32, confidence |" in text
    assert "| ResNet-50, [256, 1000], s = 0.5 | 0.90 | 1.25 | 0.90 ms |" in text
    assert "- exit_gate triton, [256, 1000] float32, confidence: ran out of memory" in text
    assert "- exit_loss [1, 2]" in text
    assert [path.name for path in tmp_path.iterdir()] == ["performance-gpu-some-bandwidth.png"]
