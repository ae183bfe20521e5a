"""The rows of `gpu.py`: times, the figures asked of them, and the table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: Bytes from which the time of a launch no longer counts.
LARGE = 64e6


@dataclass
class Figure:
    name: str
    asked: str
    reached: float
    holds: bool


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
    timed: str = ""
    copy_share: float | None = None  # of the copy bandwidth measured in the same rounds
    launches: float | None = None  # time in empty launches
    times_as_fast_as: dict[str, float] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    error: str | None = None


def figures(row: Row, about: dict[str, Any], copy_bandwidth: float, launch: float) -> list[Figure]:
    """What is asked of one of the project's own kernels. copy_bandwidth: bytes a microsecond."""
    found = []

    def at_least(name: str, asked: float, reached: float) -> None:
        found.append(Figure(name, f">= {asked:g}", reached, reached >= asked))

    def at_most(name: str, asked: float, reached: float) -> None:
        found.append(Figure(name, f"<= {asked:g}", reached, reached <= asked))

    time_us, fast = row.median_us or 0.0, row.times_as_fast_as
    least = row.bytes / copy_bandwidth
    if row.op == "exit_gate":
        N, C = row.shape
        if row.bytes >= LARGE:
            at_least("share of copy bandwidth", 0.8, least / time_us)
        if N <= 256 and C <= 1000:
            at_most("time in empty launches", 1.3, time_us / launch)
        if (N, C) == (256, 1000) and row.settings["criterion"] == "confidence":
            if "eager" in fast:
                at_least("times as fast as eager", 5, fast["eager"])
            if "torch.compile" in fast:
                at_least("times as fast as torch.compile", 1.5, fast["torch.compile"])
    elif row.op.startswith("compact"):
        # A small copy is bound by its launch, which no kernel is spared.
        small = row.bytes < LARGE
        least += launch if small else 0.0
        after = " after a launch" if small else ""
        if row.op == "compact_" and row.bytes:
            at_most(f"time in copies of its bytes{after}", 1.3, time_us / least)
        elif row.op != "compact_" and about["row bytes"] >= 2048:
            at_least(f"share of copy bandwidth{after}", 0.8, least / time_us)
    elif row.op == "exit_head" and row.bytes >= 40e6:
        at_least("share of copy bandwidth", 0.8, least / time_us)
    elif row.op == "exit_loss" and "torch.compile" in fast:
        at_least("times as fast as torch.compile", 1.5, fast["torch.compile"])
    return found


def rows_of(job: Any, case: Any, outcome: Any, copy_bytes: int) -> list[Row]:
    rows = []
    measured = outcome.measured
    for candidate in case.candidates:
        row = Row(candidate.op, candidate.name, list(job.shape), job.dtype,
                  job.settings | case.about, candidate.bytes)  # fmt: skip
        row.error = outcome.errors.get(candidate.key)
        rows.append(row)
        if candidate.key not in measured:
            row.error = row.error or "not timed"
            continue
        t = measured[candidate.key].timing
        copy, launch = measured["copy"].timing.median, measured["empty launch"].timing.median
        row.median_us, row.low, row.high = t.median, t.low, t.high
        row.timed = measured[candidate.key].how
        row.copy_share = row.bytes / (2 * copy_bytes / copy) / t.median
        row.launches = t.median / launch
        if candidate.backend is not None:
            row.times_as_fast_as = {
                other.name: measured[other.key].timing.median / t.median
                for other in case.candidates
                if other.op == row.op and other is not candidate and other.key in measured
            }
            row.figures = figures(row, case.about, 2 * copy_bytes / copy, launch)
    return rows


def show(report: dict[str, Any]) -> None:
    """Figures, the missed ones on top; then every row; then what did not run."""
    rows = report["rows"]

    def subject(row: dict[str, Any]) -> str:
        settings = " ".join(str(v) for k, v in row["settings"].items() if k != "survivors")
        return (
            f"{row['op']:16} {row['candidate']:19} {row['shape']!s:20} {row['dtype']:8} {settings}"
        )

    print(
        "\nevery row: median and quartiles in us, share of copy bandwidth, time in empty launches"
    )
    for row in rows:
        if row["error"]:
            print(f"{subject(row):110} {row['error'][:120]}")
        else:
            spread = f"{row['median_us']:.2f} ({row['low']:.2f}..{row['high']:.2f})"
            waits = "waits" if "waits" in row["timed"] else ""
            print(f"{subject(row):110} {spread:>30} {row['copy_share']:6.2f} "
                  f"{row['launches']:8.2f} {waits}")  # fmt: skip
    print("\n" + ", ".join(f"{k} {v}" for k, v in report["environment"].items()))
    for name, ceiling in report["ceilings"].items():
        rate = f", {ceiling['GB/s']:.0f} GB/s" if "GB/s" in ceiling else ""
        print(f"{name}: {ceiling['median_us']:.2f} us{rate}")
    asked = [(f, row) for row in rows for f in row["figures"]]
    asked.sort(key=lambda pair: pair[0]["holds"])
    print("\nfigures")
    for f, row in asked:
        mark = "holds" if f["holds"] else "MISSED"
        print(f"{mark:6} {f['name']:46} {f['asked']:>7} {f['reached']:8.2f}  {subject(row)}")
    held = sum(f["holds"] for f, _ in asked)
    errors = [row for row in rows if row["error"]]
    missed, left = len(asked) - held, len(report["not run"])
    print(f"\n{held} figures hold, {missed} missed")
    print(f"{len(rows)} rows, {len(errors)} with an error; {left} shapes not run")
    for error in sorted({row["error"] for row in errors}):
        print(f"{sum(row['error'] == error for row in errors):4} x {error}")
