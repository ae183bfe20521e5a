"""Rows and tables that the tests of the pages use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.row import Row
from elf_fast.timing import Quartiles


def row(
    suite: str, subject: str, baseline: str, shape: str, ratio: float, least: float | None = None,
    **other: Any,
) -> dict[str, Any]:  # fmt: skip
    """A row as a results file has it; its quartiles lie 0.01 apart from the median."""
    spread = Quartiles(ratio, ratio - 0.01, ratio + 0.01)
    needs = {part: Quartiles(20.0, 19.0, 21.0) for part in ("subject", "baseline")}
    return Row(suite, subject, baseline, shape, spread, least, needs, **other).as_json()


def tables(lines: Sequence[str]) -> dict[str, list[list[str]]]:
    """The cells of the table under each heading, without its first two lines."""
    found: dict[str, list[list[str]]] = {}
    for line in lines:
        if line.startswith("### "):
            cells = found.setdefault(line.removeprefix("### "), [])
        elif line.startswith("|"):
            cells.append([cell.strip() for cell in line.strip("|").split("|")])
    return {heading: cells[2:] for heading, cells in found.items()}


def plots(lines: Sequence[str]) -> set[str]:
    """The files of the plots that the lines show."""
    return {line.partition("(")[2].removesuffix(")") for line in lines if line.startswith("![")}
