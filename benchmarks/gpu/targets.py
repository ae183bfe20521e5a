"""Measures what the GPU kernels are held to, and prints every row with its target.

    python -m benchmarks.gpu.targets --output benchmarks/results/NAME.json [--quick]
        [--budget SECONDS] [--dry-run]
    python -m benchmarks.gpu.targets --show benchmarks/results/NAME.json [--closest N]

`timing.py` says how a time is taken; `jobs.py`, `cases.py` and `networks.py` say what is timed.
Shapes with targets come first, so that a short budget leaves out only the others. torch.compile
takes seconds for every shape, so it is timed only where a target needs it. The exit status is 1 if
a target is missed, or if a candidate is wrong or fails. --dry-run goes through everything with tiny
CPU tensors.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from ..row import HEADING, Row, closest, counts
from . import results, supervisor, worker


def show(found: dict[str, Any]) -> tuple[int, int]:
    """Prints every row, then the rows with targets with those furthest below last, the errors and
    how many shapes did not run.

    Returns: how many targets are missed, and how many candidates have an error.
    """
    rows = [Row.from_json(row) for row in found["rows"]]
    print(HEADING)
    for row in rows:
        print(row.line())
    print("\n" + ", ".join(f"{name} {value}" for name, value in found["environment"].items()))
    for name, ceiling in found["ceilings"].items():
        rate = f", {ceiling['GB/s']:.0f} GB/s" if "GB/s" in ceiling else ""
        print(f"{name}: {ceiling['median_us']:.2f} us{rate}")
    print(f"\n{HEADING}")
    for row in reversed(closest(rows)):
        print(row.line())
    errors = Counter(entry["error"] for entry in found["errors"])
    for error, n in errors.items():
        print(f"{n:4} x {error}")
    held, missed = counts(rows)
    print(
        f"\n{held} targets hold, {missed} are missed; {len(rows)} rows, {errors.total()} errors, "
        f"{len(found['not run'])} shapes not run"
    )
    return missed, errors.total()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.targets", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds for all shapes")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--dry-run", action="store_true", help="tiny CPU tensors, no GPU needed")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print results and end")
    parser.add_argument("--closest", type=int, metavar="N", help="with --show: only N rows, those "
                        "furthest below their targets or closest to them")  # fmt: skip
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.output is None and options.show is None:
        parser.error("--output or --show is needed")
    if options.closest is not None and options.show is None:
        parser.error("--closest needs --show")
    if options.worker:
        return worker.work(options.output, options)
    if options.closest is not None:
        rows = [Row.from_json(row) for row in results.read(options.show)["rows"]]
        print("\n".join([HEADING, *(row.line() for row in closest(rows, options.closest))]))
        return 0
    found = results.read(options.show) if options.show else supervisor.run(options.output, options)
    missed, errors = show(found)
    return int(errors > 0 or (missed > 0 and not options.dry_run))


if __name__ == "__main__":
    sys.exit(main())
