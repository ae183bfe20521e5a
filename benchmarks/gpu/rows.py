"""The rows of `gpu.py`: times, the figures asked of them, and the table."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

#: Bytes from which the time of a launch no longer counts.
LARGE = 64e6


@dataclass
class Row:
    op: str
    candidate: str
    shape: list[int]
    dtype: str
    settings: dict[str, Any]
    bytes: int = 0
    median_us: float | None = None
    low: float | None = None
    high: float | None = None
    waits: bool = False  # timed in a loop, not from a graph
    copy_share: float | None = None  # of the copy bandwidth measured in the same rounds
    launches: float | None = None  # time in empty launches
    times_as_fast_as: dict[str, float] = field(default_factory=dict)
    figures: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None


def figures(row: Row, copy_bandwidth: float, launch: float) -> list[dict[str, Any]]:
    """What is asked of one of the project's own kernels: name, bound and value reached, and how far
    that is ahead of the bound (1: just there). copy_bandwidth: bytes a microsecond."""
    found = []

    def at_least(name: str, asked: float, reached: float) -> None:
        found.append({"name": name, "asked": f">= {asked:g}", "reached": reached,
                      "ahead": reached / asked})  # fmt: skip

    def at_most(name: str, asked: float, reached: float) -> None:
        found.append({"name": name, "asked": f"<= {asked:g}", "reached": reached,
                      "ahead": asked / reached})  # fmt: skip

    time_us, fast = row.median_us or 0.0, row.times_as_fast_as
    least = row.bytes / copy_bandwidth
    if row.op == "exit_gate":
        N, C = row.shape
        if (N, C) == (256, 1000) and row.settings["criterion"] == "confidence":
            for other, asked in (("eager", 5), ("torch.compile", 1.5)):
                if other in fast:
                    at_least(f"times as fast as {other}", asked, fast[other])
        if row.bytes >= LARGE and not row.waits:
            at_least("share of copy bandwidth", 0.8, least / time_us)
        if N <= 256 and C <= 1000 and not row.waits:
            at_most("time in empty launches", 1.3, time_us / launch)
    elif row.op.startswith("compact"):
        # A small copy is bound by its launch, which no kernel is spared.
        small = row.bytes < LARGE
        least += launch if small else 0.0
        after = " after a launch" if small else ""
        if row.op == "compact_" and row.bytes:
            at_most(f"time in copies of its bytes{after}", 1.3, time_us / least)
        elif row.op != "compact_" and row.settings["row bytes"] >= 2048 and row.bytes:
            at_least(f"share of copy bandwidth{after}", 0.8, least / time_us)
    elif row.op == "exit_head" and row.bytes >= 40e6 and not row.waits:
        at_least("share of copy bandwidth", 0.8, least / time_us)
    elif row.op == "exit_loss" and "torch.compile" in fast:
        at_least("times as fast as torch.compile", 1.5, fast["torch.compile"])
    return found


def _is_own(candidate: Any) -> bool:
    """Whether it is the project's: a kernel, or a network on the default kernels."""
    return candidate.backend is not None or candidate.name == "elf_fast"


def rows_of(
    job: Any, case: Any, measured: dict[str, Any], errors: dict[str, str], copied: int
) -> list[Row]:
    """A row for each candidate of `case`. copied: bytes read and written by the ceiling `copy`."""
    rows = []
    for candidate in case.candidates:
        row = Row(candidate.op, candidate.name, list(job.shape), job.dtype,
                  job.settings | case.about, candidate.bytes)  # fmt: skip
        rows.append(row)
        if candidate.key not in measured:
            row.error = errors.get(candidate.key, "not timed")
            continue
        t, row.waits = measured[candidate.key].timing, measured[candidate.key].waits
        bandwidth = copied / measured["copy"].timing.median
        launch = measured["empty launch"].timing.median
        row.median_us, row.low, row.high = t.median, t.low, t.high
        row.copy_share = row.bytes / bandwidth / t.median
        row.launches = t.median / launch
        if _is_own(candidate):
            row.times_as_fast_as = {
                other.name: measured[other.key].timing.median / t.median
                for other in case.candidates
                if other.op == row.op and not _is_own(other) and other.key in measured
                if measured[other.key].waits == row.waits or row.op == "network"
            }
            row.figures = figures(row, bandwidth, launch)
    return rows


def _subject(row: dict[str, Any]) -> str:
    settings = " ".join(str(v) for k, v in row["settings"].items() if not k.endswith("bytes"))
    return f"{row['op']:16} {row['candidate']:19} {row['shape']!s:20} {row['dtype']:8} {settings}"


def figure_line(figure: dict[str, Any], row: dict[str, Any]) -> str:
    mark = "holds" if figure["ahead"] >= 1 else "MISSED"
    return (
        f"{mark:6} {figure['name']:46} {figure['asked']:>7} {figure['reached']:8.2f}  "
        f"{_subject(row)}"
    )


def worst(report: dict[str, Any], n: int | None = None) -> list[tuple[dict[str, Any], Any]]:
    """The n figures (None: all) that are furthest behind, each with its row."""
    asked = [(figure, row) for row in report["rows"] for figure in row["figures"]]
    return sorted(asked, key=lambda pair: pair[0]["ahead"])[:n]


def show(report: dict[str, Any]) -> tuple[int, int]:
    """Prints every row, the figures with the furthest behind last, and what did not run.

    Returns: how many figures are missed, and how many rows have an error.
    """
    rows = report["rows"]
    print("median and quartiles in us, share of copy bandwidth, time in empty launches")
    for row in rows:
        if row["error"]:
            print(f"{_subject(row):110} {row['error'][:120]}")
        else:
            spread = f"{row['median_us']:.2f} ({row['low']:.2f}..{row['high']:.2f})"
            print(f"{_subject(row):110} {spread:>30} {row['copy_share']:6.2f} "
                  f"{row['launches']:8.2f}{' waits' if row['waits'] else ''}")  # fmt: skip
    print("\n" + ", ".join(f"{k} {v}" for k, v in report["environment"].items()))
    for name, ceiling in report["ceilings"].items():
        rate = f", {ceiling['GB/s']:.0f} GB/s" if "GB/s" in ceiling else ""
        print(f"{name}: {ceiling['median_us']:.2f} us{rate}")
    asked = worst(report)
    print()
    for figure, row in reversed(asked):
        print(figure_line(figure, row))
    errors = Counter(row["error"] for row in rows if row["error"])
    for error, n in errors.items():
        print(f"{n:4} x {error}")
    missed = sum(figure["ahead"] < 1 for figure, _ in asked)
    print(
        f"\n{len(asked) - missed} figures hold, {missed} missed; {len(rows)} rows, "
        f"{errors.total()} with an error; {len(report['not run'])} shapes not run"
    )
    return missed, errors.total()
