"""Writes docs/performance.md and its plots from the results of `figures.py` on CPUs
(benchmarks/results/cpu-*.json) and of `gpu.py` (gpu-*.json).

    python -m benchmarks.pages.performance
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..row import amount
from . import gpu, plots

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

ABOUT = """# Performance

Written by `python -m benchmarks.pages.performance` from the results in `benchmarks/results/`;
nothing here is typed by hand. Every row measures two things in one run, in turn. *Times* is what the
baseline needs over what the subject needs (median, with quartiles, over the repetitions): above 1
the subject is better. A row with a figure in *asked* is held to it.

Baselines: `reference` is plain PyTorch with boolean masks, what users have today; `sceptic` the
best plain PyTorch without kernels of one's own; `full` the network without exits; `oracle` its
stages alone on batches compacted beforehand, below which no early exit can go (*times* beside it
is the exit efficiency); `padded` drops nothing; `earlyon` is the package from PyPI, whose batched
mode lets a batch leave only as a whole. N is the batch, s the share of samples that goes on after
each exit. Networks are untrained; temperatures and thresholds are set for s. At inference BatchNorm
is folded into the convolutions, for all of them. An operator's limit is a `read-only pass` over its
input, or a `copy` of the bytes that it moves.
"""


def table(rows: Iterable[dict[str, Any]]) -> list[str]:
    lines = [
        "| subject | beside | shape | times | quartiles | asked | | subject needs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        median, low, high = row["ratio"]
        asked = "" if row["least"] is None else f">= {row['least']:.3g}"
        verdict = {True: "holds", False: "**missed**", None: ""}[row["holds"]]
        needs = amount(row["needs"]["subject"][0], row["unit"])
        lines.append(
            f"| {row['subject']} | {row['baseline']} | {row['shape']} | {median:.3g} | "
            f"{low:.3g} to {high:.3g} | {asked} | {verdict} | {needs} |"
        )
    return lines


def page(name: str, found: dict[str, Any], folder: Path) -> list[str]:
    """The section of a CPU's results, suite by suite; its plots go into `folder`."""
    rows = [row for suite in found.values() for row in suite["rows"]]
    measured: dict[str, list[str]] = {}  # suites by where and when
    for suite, result in found.items():
        about = ", ".join(f"{key} {value}" for key, value in result["environment"].items())
        measured.setdefault(about, []).append(suite)
    missed = [row for row in rows if row["holds"] is False]
    behind = [row for row in rows if row["holds"] is None and _behind(row)]
    judged = [row for row in rows if row["holds"] is not None]
    lines = [f"## {name}", ""]
    lines += [f"- {', '.join(suites)}: {about}" for about, suites in measured.items()]
    lines.append("")
    lines += [f"{len(judged) - len(missed)} of {len(judged)} figures hold.", ""]
    if missed:
        lines += ["### Missed", "", *table(missed), ""]
    if behind:
        lines += [
            "### Behind, where nothing is asked", "",
            "Rows whose upper quartile is below 1, beside anything but the limits (`oracle`, "
            "`read-only pass`, `copy`).", "", *table(behind), "",
        ]  # fmt: skip
    for title, plot in (
        ("Share of the limit", plots.limits),
        ("Exit efficiency", plots.efficiency),
        ("Growth", plots.growth),
    ):
        lines += plots.section(title, plot, rows, folder, name)
    for suite, result in found.items():
        lines += [f"### All rows: {suite}", "", *table(result["rows"]), ""]
    return lines


def _behind(row: dict[str, Any]) -> bool:
    return row["ratio"][2] < 1 and row["baseline"] not in ("oracle", *plots.LIMITS)


def main() -> None:
    results = ROOT / "benchmarks" / "results"
    lines = [ABOUT]
    for kind, write in (("gpu", gpu.page), ("cpu", page)):
        for file in sorted(results.glob(f"{kind}-*.json")):
            lines += write(file.stem, json.loads(file.read_text()), DOCS)
    (DOCS / "performance.md").write_text("\n".join(lines).rstrip() + "\n")
    print(DOCS / "performance.md")


if __name__ == "__main__":
    main()
