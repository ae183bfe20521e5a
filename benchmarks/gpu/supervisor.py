"""Runs workers until the work is done.

A worker that crashes or hangs costs only the shape that it was measuring: that shape becomes an
error in the results, and another worker goes on with the next one. If a candidate makes the device
unusable, another worker measures the other candidates of the shape.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from . import results

#: Seconds without progress after which a worker counts as hung.
HUNG = 60.0
#: Seconds that the shape in hand may still take when the budget is spent.
GRACE = 20.0


def run(output: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Starts workers one after the other until one finishes or the budget is spent.

    Returns: the results, which the file `output` holds as well.
    """
    end = time.monotonic() + options.budget
    output.parent.mkdir(parents=True, exist_ok=True)
    results.write(output, results.new())
    settings = {"TRITON_INTERPRET": "1"} if options.dry_run else {}
    flags = ["--quick"] * options.quick + ["--dry-run"] * options.dry_run
    command = [sys.executable, "-m", "benchmarks.gpu.targets", "--worker", "--output", str(output)]
    while (left := end - time.monotonic()) > 0:
        before = results.read(output)
        worker = subprocess.Popen(
            [*command, *flags, "--budget", str(left)], env=os.environ | settings
        )
        why = _watch(worker, output, end + GRACE)
        found = results.read(output)
        unfinished = [name for name in found["begun"] if name not in found["reported"]]
        at_start = all(found[k] == before[k] for k in ("begun", "broken"))
        if why:
            blamed = [*unfinished, *(["start"] if at_start else [])]
            found["errors"] += [{"subject": name, "shape": "", "error": why} for name in blamed]
        else:
            found["not run"] += unfinished
        found["reported"] += unfinished
        results.write(output, found)
        if at_start or not why:
            break
    found = results.read(output)
    for name in results.PROGRESS:
        found.pop(name)
    results.write(output, found)
    return found


def _watch(worker: subprocess.Popen[bytes], output: Path, end: float) -> str:
    """Waits for a worker, and kills it when it hangs or at `end`.

    Returns: why it ended before its work was done; empty if it finished or time was up.
    """
    while True:
        try:
            status = worker.wait(timeout=2.0)
            return f"the process ended with status {status}" if status else ""
        except subprocess.TimeoutExpired:
            idle = time.time() - output.stat().st_mtime
            if idle > HUNG or time.monotonic() > end:
                worker.kill()
                worker.wait()
                return f"it hung for {idle:.0f} s" if idle > HUNG else ""
