"""The plots of docs/performance.md."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..row import Row
from .tables import LIMITS

COLOURS = {"elf_fast": "#2a9d8f", "reference": "#7b5ea7", "full": "#808080"}
BACKENDS = {"cuda": "#2a9d8f", "triton": "#d9822b"}
INK = "#808080"


def section(
    title: str, plot: Callable[..., Figure | None], rows: list[Row], folder: Path, name: str
) -> list[str]:
    """Writes plot(rows) into `folder`. Returns the lines of Markdown that show it; none if plot has
    nothing to draw."""
    figure = plot(rows)
    if figure is None:
        return []
    file = f"performance-{name}-{plot.__name__}.png"
    figure.savefig(folder / file, dpi=150, transparent=True, bbox_inches="tight")
    return [f"### {title}", "", f"![{title}]({file})", ""]


def _axes(figure: Figure, place: Any, title: str) -> Any:
    axes = figure.add_subplot(place)
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


def efficiency(rows: list[Row]) -> Figure | None:
    """The exit efficiency: the oracle's time divided by elf_fast's, by network, batch size and
    share."""
    points: dict[str, dict[str, list[tuple[int, list[float]]]]] = {}
    for row in rows:
        found = re.fullmatch(r"(.+), N = (\d+), s = (\S+)", row.shape)
        if row.suite == "inference" and row.baseline == "oracle" and found:
            network, N, share = found[1], int(found[2]), found[3]
            points.setdefault(network, {}).setdefault(share, []).append((N, row.ratio))
    if not points:
        return None
    figure = Figure(figsize=(3.2 * len(points), 2.8))
    grid = figure.add_gridspec(1, len(points))
    for i, (network, by_share) in enumerate(points.items()):
        axes = _axes(figure, grid[i], network)
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


def growth(rows: list[Row]) -> Figure | None:
    """The time of an inference over N, over C and over the number of exits."""
    points: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        found = re.search(r"(\w+) = (\d+)$", row.shape)
        if row.suite == "growth" and found:
            of_axis = points.setdefault(found[1], {})
            subject = (int(found[2]), row.needs["subject"].median / 1e3)
            if subject not in of_axis.setdefault("elf_fast", []):
                of_axis["elf_fast"].append(subject)
            baseline = (int(found[2]), row.needs["baseline"].median / 1e3)
            of_axis.setdefault(row.baseline, []).append(baseline)
    if not points:
        return None
    figure = Figure(figsize=(3.2 * len(points), 2.8))
    grid = figure.add_gridspec(1, len(points))
    for i, (axis, series) in enumerate(points.items()):
        axes = _axes(figure, grid[i], f"ResNet-32, s = 0.5, growing {axis}")
        for candidate, values in series.items():
            axes.plot(*zip(*values, strict=True), marker="o", markersize=4, label=candidate,
                      color=COLOURS.get(candidate, "#b0b0b0"))  # fmt: skip
        _log_axis(axes, {at for values in series.values() for at, _ in values})
        axes.set_ylim(0, None)
        axes.set_xlabel(axis, color=INK, fontsize=8)
        if i == 0:
            axes.set_ylabel("ms", color=INK, fontsize=8)
        axes.legend(frameon=False, labelcolor=INK, fontsize=7)
    figure.tight_layout()
    return figure


def limits(rows: list[Row]) -> Figure | None:
    """The share of the limit (`LIMITS`) that each operator reaches on a CPU, by shape."""
    points: dict[str, list[tuple[str, list[float]]]] = {}
    for row in rows:
        if row.baseline in LIMITS:
            points.setdefault(row.subject, []).append((row.shape, row.ratio))
    if not points:
        return None
    sizes = [len(bars) + 1.5 for bars in points.values()]
    figure = Figure(figsize=(6.4, 0.19 * sum(sizes) + 0.4))
    grid = figure.add_gridspec(len(points), 1, height_ratios=sizes)
    for place, (subject, bars) in zip(grid, points.items(), strict=True):
        axes = _axes(figure, place, subject)
        for i, (_, (median, low, high)) in enumerate(bars):
            axes.barh(i, median, height=0.6, color=COLOURS["elf_fast"])
            axes.plot((low, high), (i, i), color=INK, linewidth=1)
        axes.set_yticks(range(len(bars)), [shape for shape, _ in bars])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, 1.2)
        axes.axvline(1.0, color=INK, linewidth=1, linestyle="--")
    axes.set_xlabel("share of the limit", color=INK, fontsize=8)
    figure.tight_layout()
    return figure


def bandwidth(rows: list[Row]) -> Figure | None:
    """The share of copy bandwidth that the kernels reach on a GPU, by the bytes that they move."""
    points: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        op, _, backend = row.subject.partition(", ")
        if backend in BACKENDS and row.baseline == "copy":
            point = (row.bytes, row.ratio.median)
            points.setdefault(op, {}).setdefault(backend, []).append(point)
    if not points:
        return None
    columns = 3
    lines = -(-len(points) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * lines))
    grid = figure.add_gridspec(lines, columns)
    for i, (op, by_backend) in enumerate(points.items()):
        axes = _axes(figure, grid[i], op)
        for backend, values in sorted(by_backend.items()):
            axes.scatter(*zip(*values, strict=True), s=8, label=backend, color=BACKENDS[backend])
        axes.axhline(1.0, color=INK, linewidth=1, linestyle="--")
        axes.set_xscale("log")
        axes.tick_params(axis="x", which="minor", labelbottom=False)
        axes.set_ylim(0, 1.2)
        axes.set_xlabel("bytes", color=INK, fontsize=8)
        if i % columns == 0:
            axes.set_ylabel("share of copy bandwidth", color=INK, fontsize=8)
        axes.legend(frameon=False, labelcolor=INK, fontsize=7)
    figure.tight_layout()
    return figure
