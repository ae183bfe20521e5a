"""Writes docs/performance.md and its plots from benchmarks/results/cpu-*.json.

python benchmarks/performance.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from figure_rows import amount
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
COLOURS = {"elf_fast": "#2a9d8f", "reference": "#7b5ea7", "sceptic": "#d9822b", "full": "#808080"}
INK = "#808080"

ABOUT = """# Performance

Written by `python benchmarks/performance.py` from the results in `benchmarks/results/`; nothing
here is typed by hand. Every row measures two things in one run, in turn. *Times* is what the
baseline needs over what the subject needs (median, with quartiles, over the repetitions): above 1
the subject is better. A row with a figure in *asked* is held to it.

Baselines: `reference` is plain PyTorch with boolean masks, what users have today; `sceptic` the
best plain PyTorch without kernels of one's own; `full` the network without exits; `oracle` its
stages alone on batches compacted beforehand, below which no early exit can go (*times* beside it
is the exit efficiency); `padded` drops nothing; `earlyon` is the package from PyPI, whose batched
mode lets a batch leave only as a whole. N is the batch, s the share of samples that goes on after
each exit. Networks are untrained; temperatures and thresholds are set for s. At inference BatchNorm
is folded into the convolutions, for all of them.
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


def page(name: str, found: dict[str, Any]) -> list[str]:
    rows = found["rows"]
    about = ", ".join(f"{key} {value}" for key, value in found["environment"].items())
    missed = [row for row in rows if row["holds"] is False]
    behind = [row for row in rows if row["holds"] is None and _behind(row)]
    judged = [row for row in rows if row["holds"] is not None]
    lines = [f"## {name}", "", about, ""]
    lines += [f"{len(judged) - len(missed)} of {len(judged)} figures hold.", ""]
    if missed:
        lines += ["### Missed", "", *table(missed), ""]
    if behind:
        lines += [
            "### Behind, where nothing is asked", "",
            "Rows whose upper quartile is below 1, beside anything but the limits (`oracle`, a "
            "read-only pass).", "", *table(behind), "",
        ]  # fmt: skip
    for plot, title in ((efficiency, "Exit efficiency"), (growth, "Growth")):
        figure = plot(rows)
        if figure is not None:
            file = f"performance-{name}-{plot.__name__}.png"
            figure.savefig(DOCS / file, dpi=150, transparent=True, bbox_inches="tight")
            lines += [f"### {title}", "", f"![{title}]({file})", ""]
    for suite in dict.fromkeys(row["suite"] for row in rows):
        of_suite = [row for row in rows if row["suite"] == suite]
        lines += [f"### All rows: {suite}", "", *table(of_suite), ""]
    return lines


def _behind(row: dict[str, Any]) -> bool:
    return row["ratio"][2] < 1 and row["baseline"] not in ("oracle", "read-only pass")


def _axes(figure: Figure, place: Sequence[int], title: str) -> Any:
    axes = figure.add_subplot(*place)
    axes.set_title(title, color=INK, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(color=INK, alpha=0.2, linewidth=0.6)
    return axes


def _log_axis(axes: Any, values: Iterable[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(values), [str(value) for value in sorted(values)])
    axes.set_xticks([], minor=True)


def efficiency(rows: list[dict[str, Any]]) -> Figure | None:
    """Time of the oracle over that of elf_fast, by network, batch size and share."""
    points: dict[str, dict[str, list[tuple[int, list[float]]]]] = {}
    for row in rows:
        found = re.fullmatch(r"(.+), N = (\d+), s = (\S+)", row["shape"])
        if row["suite"] == "inference" and row["baseline"] == "oracle" and found:
            network, N, share = found[1], int(found[2]), found[3]
            points.setdefault(network, {}).setdefault(share, []).append((N, row["ratio"]))
    if not points:
        return None
    figure = Figure(figsize=(3.2 * len(points), 2.8))
    for i, (network, by_share) in enumerate(points.items()):
        axes = _axes(figure, (1, len(points), i + 1), network)
        for share, series in sorted(by_share.items()):
            N = [n for n, _ in series]
            median, low, high = zip(*(ratio for _, ratio in series), strict=True)
            spread = ([m - a for m, a in zip(median, low, strict=True)],
                      [b - m for m, b in zip(median, high, strict=True)])  # fmt: skip
            axes.errorbar(N, median, spread, marker="o", markersize=4, capsize=3,
                          label=f"s = {share}")  # fmt: skip
        axes.axhline(1.0, color=INK, linewidth=1, linestyle="--")
        _log_axis(axes, {N for series in by_share.values() for N, _ in series})
        axes.set_ylim(0.7, 1.1)
        axes.set_xlabel("batch size", color=INK, fontsize=8)
        if i == 0:
            axes.set_ylabel("exit efficiency", color=INK, fontsize=8)
        axes.legend(frameon=False, labelcolor=INK, fontsize=7)
    figure.tight_layout()
    return figure


def growth(rows: list[dict[str, Any]]) -> Figure | None:
    """Time of an inference against N, C and the number of exits."""
    points: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        found = re.search(r"(\w+) = (\d+)$", row["shape"])
        if row["suite"] == "growth" and found:
            of_axis = points.setdefault(found[1], {})
            subject = (int(found[2]), row["needs"]["subject"][0] / 1e3)
            if subject not in of_axis.setdefault("elf_fast", []):
                of_axis["elf_fast"].append(subject)
            baseline = (int(found[2]), row["needs"]["baseline"][0] / 1e3)
            of_axis.setdefault(row["baseline"], []).append(baseline)
    if not points:
        return None
    figure = Figure(figsize=(3.2 * len(points), 2.8))
    for i, (axis, series) in enumerate(points.items()):
        axes = _axes(figure, (1, len(points), i + 1), f"ResNet-32, s = 0.5, growing {axis}")
        for who, values in series.items():
            axes.plot(*zip(*values, strict=True), marker="o", markersize=4, label=who,
                      color=COLOURS.get(who, "#b0b0b0"))  # fmt: skip
        _log_axis(axes, {at for values in series.values() for at, _ in values})
        axes.set_ylim(0, None)
        axes.set_xlabel(axis, color=INK, fontsize=8)
        if i == 0:
            axes.set_ylabel("ms", color=INK, fontsize=8)
        axes.legend(frameon=False, labelcolor=INK, fontsize=7)
    figure.tight_layout()
    return figure


def main() -> None:
    lines = [ABOUT]
    for file in sorted((ROOT / "benchmarks/results").glob("cpu-*.json")):
        lines += page(file.stem, json.loads(file.read_text()))
    (DOCS / "performance.md").write_text("\n".join(lines).rstrip() + "\n")
    print(DOCS / "performance.md")


if __name__ == "__main__":
    main()
