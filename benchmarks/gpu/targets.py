"""The targets of the GPU kernels, measured in one run.

    python -m benchmarks.gpu.targets --output benchmarks/results/NAME.json [--quick]
    python -m benchmarks.gpu.targets --show benchmarks/results/NAME.json

`gpu_timing.py` says how a time is taken, `gpu_jobs.py` and `gpu_cases.py` what is timed. Rows whose
figures are asked for come first, so that a short budget drops only what informs. A row that misses
its figure, a candidate that is wrong and one that fails are printed like the others; with any of
them the exit status is 1. The work is done in a second process: where one crashes or hangs, another
goes on after the shape in hand; where a candidate loses the device, another measures the rest of
its shape. torch.compile, which takes seconds a shape, runs where a figure compares with it.
--dry-run goes through all of it on tiny CPU tensors.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .rows import Row, rows_of, show

HERE = Path(__file__).resolve()
#: Seconds that one shape may take before it counts as hung, and that the one in hand may still take
#: when the budget is spent.
HUNG = 60.0
GRACE = 20.0


def environment(bench: Any) -> dict[str, Any]:
    import torch
    import triton

    def ask(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
        except OSError:
            return "unknown"
        return done.stdout.strip() or "unknown"

    about = {
        "date": datetime.date.today().isoformat(),
        "commit": ask("git", "rev-parse", "HEAD"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "CUDA": torch.version.cuda,
    }
    if bench.device == "cpu":
        return about | {"gpu": "none: dry run"}
    properties = torch.cuda.get_device_properties(0)
    return about | {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "L2 bytes": properties.L2_cache_size,
        "memory bytes": properties.total_memory,
        "driver": ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }


def read(output: Path) -> dict[str, Any]:
    return json.loads(output.read_text())


def write(output: Path, report: dict[str, Any]) -> None:
    written = output.with_suffix(".part")
    written.write_text(json.dumps(report, indent=1) + "\n")
    written.replace(output)


def work(output: Path, options: argparse.Namespace) -> int:
    """Runs jobs until none is left or the budget is spent, and keeps the report up to date.

    Returns: the exit status; 1 if only a new process can go on.
    """
    import torch

    from .jobs import jobs
    from .timing import DryRun, Gpu, error_text

    end = time.perf_counter() + options.budget
    torch.manual_seed(0)
    report = read(output)
    bench = DryRun() if options.dry_run else Gpu(0.06 if options.quick else 0.15)
    report["environment"] = environment(bench)
    pending = [job for job in jobs(bench) if job.name not in report["begun"]]
    while pending and time.perf_counter() < end:
        job = pending.pop(0)
        report["begun"].append(job.name)
        report["not run"] = [job.name for job in pending]
        write(output, report)
        alive = True
        known = report["broken"].get(job.name, {})
        try:
            with torch.no_grad():
                case = job.build(bench, *job.arguments)
                left = [c for c in case.candidates if c.key not in known]
                measured, errors = bench.measure(left, case.sets, case.touched)
            if not measured:
                report["begun"].remove(job.name)
                report["broken"][job.name] = known | errors
                write(output, report)
                return 1
            rows = rows_of(job, case, measured, known | errors, 2 * bench.copy_bytes)
        except Exception as error:
            rows = [Row(job.op, "all", list(job.shape), job.dtype, job.settings,
                        error=error_text(error))]  # fmt: skip
            alive = bench.alive()
        report["rows"] += [asdict(row) for row in rows]
        report["reported"].append(job.name)
        report["ceilings"] = bench.ceiling_report() or report["ceilings"]
        write(output, report)
        if not alive:
            return 1
        case = None  # its memory goes before the next one's comes
        bench.clear()
    return 0


def supervise(output: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The report, from workers until one finishes; a shape that ended or blocked one is an error in
    it."""
    end = time.monotonic() + options.budget
    output.parent.mkdir(parents=True, exist_ok=True)
    lists: dict[str, list[Any]] = {k: [] for k in ("rows", "begun", "reported", "not run")}
    # Candidates that lost the device, with their errors, by shape.
    write(output, {"environment": {}, "ceilings": {}, "broken": {}} | lists)
    settings = {"TRITON_INTERPRET": "1"} if options.dry_run else {}
    flags = ["--quick"] * options.quick + ["--dry-run"] * options.dry_run
    while (left := end - time.monotonic()) > 0:
        before = read(output)
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu.targets",
            "--output",
            str(output),
            "--worker",
            *flags,
        ]
        worker = subprocess.Popen([*command, "--budget", str(left)], env=os.environ | settings)
        why = _watch(worker, output, end + GRACE)
        report = read(output)
        unfinished = [name for name in report["begun"] if name not in report["reported"]]
        at_start = all(report[k] == before[k] for k in ("begun", "broken"))
        if why:
            blamed = [*unfinished, *(["start"] if at_start else [])]
            report["rows"] += [asdict(Row(name, "all", [], "", {}, error=why)) for name in blamed]
        else:
            report["not run"] += unfinished
        report["reported"] += unfinished
        write(output, report)
        if at_start or not why:
            break
    for name in ("begun", "broken", "reported"):
        report.pop(name)
    write(output, report)
    return report


def _watch(worker: subprocess.Popen[bytes], output: Path, end: float) -> str:
    """Why the worker ended before its work did; empty if it did not, or at `end`."""
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="the report as JSON")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds in all")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--dry-run", action="store_true", help="tiny CPU tensors, no GPU")
    parser.add_argument("--show", type=Path, help="print a report and end")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.output is None and options.show is None:
        parser.error("--output or --show is needed")
    if options.worker:
        return work(options.output, options)
    report = read(options.show) if options.show else supervise(options.output, options)
    missed, errors = show(report)
    return int(errors > 0 or (missed > 0 and not options.dry_run))


if __name__ == "__main__":
    sys.exit(main())
