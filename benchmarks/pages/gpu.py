"""The section of a GPU in docs/performance.md, from the results of `benchmarks.gpu.targets`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..row import Row, closest
from . import plots
from .tables import table, verdicts


def page(name: str, found: dict[str, Any], folder: Path) -> list[str]:
    """The lines of the section. Rows without a target are in it only where the subject is slower
    than the baseline: there are thousands. Writes the plot into `folder`."""
    rows = [Row.from_json(row) for row in found["rows"]]
    ceilings = ", ".join(
        f"{ceiling} {at['GB/s']:.0f} GB/s"
        if "GB/s" in at
        else f"{ceiling} {at['median_us']:.2f} us"
        for ceiling, at in found["ceilings"].items()
    )
    lines = [f"## {name}", ""]
    lines += [", ".join(f"{key} {value}" for key, value in found["environment"].items()), ""]
    lines += [f"{ceilings}.", "", *verdicts(rows), *_networks(rows)]
    lines += plots.section("Share of copy bandwidth", plots.bandwidth, rows, folder, name)
    held = [row for row in closest(rows) if row.holds]
    if held:
        lines += ["### Targets that hold", "", *table(held), ""]
    if found["errors"] or found["not run"]:
        failed = sorted({": ".join(_said(error)) for error in found["errors"]})
        lines += ["### Not measured", "", *(f"- {line}" for line in failed)]
        lines += [*(f"- {shape}" for shape in found["not run"]), ""]
    return lines


def _said(error: dict[str, str]) -> tuple[str, str]:
    return ", ".join(part for part in (error["subject"], error["shape"]) if part), error["error"]


def _networks(rows: Sequence[Row]) -> list[str]:
    """A table with a line for each network: the speed-up over every baseline."""
    by_shape: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.suite == "network":
            by_shape.setdefault(row.shape, {})[row.baseline] = row
    if not by_shape:
        return []
    baselines = list(dict.fromkeys(name for found in by_shape.values() for name in found))
    lines = ["### Networks", "", "Speed-up of elf_fast; beside `oracle`, the exit efficiency.", ""]
    lines += [f"| network | {' | '.join(baselines)} | elf_fast needs |"]
    lines += ["|---" * (len(baselines) + 2) + "|"]
    for shape, found in by_shape.items():
        cells = (f"{found[b].ratio.median:.2f}" if b in found else "" for b in baselines)
        needed = next(iter(found.values())).needed
        lines.append(f"| {shape} | {' | '.join(cells)} | {needed} |")
    return [*lines, ""]
