"""A GPU's part of docs/performance.md, from the JSON of `gpu.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..gpu.rows import worst
from . import plots


def page(name: str, report: dict[str, Any], folder: Path) -> list[str]:
    """The section of a GPU's results; its plots go into `folder`."""
    rows = report["rows"]
    asked = worst(report)
    missed = [pair for pair in asked if pair[0]["ahead"] < 1]
    held = asked[len(missed) :]
    ceilings = ", ".join(
        f"{ceiling} {at['GB/s']:.0f} GB/s"
        if "GB/s" in at
        else f"{ceiling} {at['median_us']:.2f} us"
        for ceiling, at in report["ceilings"].items()
    )
    lines = [f"## {name}", ""]
    lines += [", ".join(f"{key} {value}" for key, value in report["environment"].items()), ""]
    lines += [f"{ceilings}. {len(held)} of {len(asked)} figures hold.", ""]
    if missed:
        lines += ["### Missed", "", *_figures(missed), ""]
    lines += _behind(rows)
    lines += _networks(rows)
    lines += plots.section("Share of copy bandwidth", plots.bandwidth, rows, folder, name)
    if held:
        lines += ["### Figures that hold", "", *_figures(held), ""]
    left_out = [row for row in rows if row["error"]]
    if left_out or report["not run"]:
        failed = sorted({f"{_subject(row)}: {row['error']}" for row in left_out})
        lines += ["### Not measured", "", *(f"- {line}" for line in failed)]
        lines += [*(f"- {shape}" for shape in report["not run"]), ""]
    return lines


def _subject(row: dict[str, Any]) -> str:
    settings = ", ".join(
        f"{value}" if isinstance(value, str) else f"{key} {value}"
        for key, value in row["settings"].items()
    )
    return f"{row['op']} {row['candidate']}, {row['shape']} {row['dtype']}, {settings}"


def _figures(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[str]:
    lines = ["| figure | asked | reached | of |", "|---|---|---|---|"]
    for figure, row in pairs:
        lines.append(
            f"| {figure['name']} | {figure['asked']} | {figure['reached']:.2f} | {_subject(row)} |"
        )
    return lines


def _behind(rows: list[dict[str, Any]]) -> list[str]:
    """Kernels that something else is faster than, furthest behind first."""
    slower = [
        (times, other, row)
        for row in rows
        if row["op"] != "network"
        for other, times in row["times_as_fast_as"].items()
        if times < 1
    ]
    if not slower:
        return []
    lines = ["### Slower than something else", ""]
    lines += ["| times as fast | as | what | needs |", "|---|---|---|---|"]
    for times, other, row in sorted(slower, key=lambda entry: entry[0]):
        lines.append(f"| {times:.2f} | {other} | {_subject(row)} | {row['median_us']:.1f} us |")
    return [*lines, ""]


def _networks(rows: list[dict[str, Any]]) -> list[str]:
    """How many times as fast elf_fast is as each rival; beside the oracle, the exit efficiency."""
    own = [row for row in rows if row["op"] == "network" and row["times_as_fast_as"]]
    if not own:
        return []
    rivals = list(dict.fromkeys(name for row in own for name in row["times_as_fast_as"]))
    lines = ["### Networks", "", "Times as fast as; beside `oracle`, the exit efficiency.", ""]
    lines += [f"| network | {' | '.join(rivals)} | needs |", "|---" * (len(rivals) + 2) + "|"]
    for row in own:
        times = (row["times_as_fast_as"].get(name) for name in rivals)
        cells = ("" if value is None else f"{value:.2f}" for value in times)
        about = f"{row['settings']['network']}, {row['shape']}, s = {row['settings']['share']}"
        lines.append(f"| {about} | {' | '.join(cells)} | {row['median_us'] / 1e3:.2f} ms |")
    return [*lines, ""]
