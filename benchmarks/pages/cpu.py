"""The section of a CPU in docs/performance.md, from the results of `benchmarks.cpu.targets`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..row import Row
from . import plots
from .tables import table, verdicts


def page(name: str, found: dict[str, Any], folder: Path) -> list[str]:
    """The lines of the section, with every row of every suite. Writes its plots into `folder`."""
    suites = {
        suite: [Row.from_json(row) for row in result["rows"]] for suite, result in found.items()
    }
    rows = [row for of_suite in suites.values() for row in of_suite]
    measured: dict[str, list[str]] = {}  # suites, by where and when they ran
    for suite, result in found.items():
        about = ", ".join(f"{key} {value}" for key, value in result["environment"].items())
        measured.setdefault(about, []).append(suite)
    lines = [f"## {name}", ""]
    lines += [f"- {', '.join(names)}: {about}" for about, names in measured.items()]
    lines += ["", *verdicts(rows)]
    for title, plot in (
        ("Share of the limit", plots.limits),
        ("Exit efficiency", plots.efficiency),
        ("Growth", plots.growth),
    ):
        lines += plots.section(title, plot, rows, folder, name)
    for suite, of_suite in suites.items():
        lines += [f"### All rows: {suite}", "", *table(of_suite), ""]
    return lines
