"""The process that measures: one job after the other, with the results on disk after each."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import triton

from ..environment import ask, environment
from . import results
from .jobs import Job, jobs
from .rows import describe, errors_of, rows_of
from .timing import DryRun, Gpu, error_text


def gpu_environment(bench: Gpu) -> dict[str, Any]:
    """What the results record of the device and the software."""
    known = environment()
    about = {name: known[name] for name in ("date", "commit", "torch")}
    about |= {"triton": triton.__version__, "CUDA": torch.version.cuda}
    if bench.device == "cpu":
        return about | {"gpu": "none: dry run"}
    properties = torch.cuda.get_device_properties(0)
    driver = ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return about | {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "L2 bytes": properties.L2_cache_size,
        "memory bytes": properties.total_memory,
        "driver": driver or "unknown",
    }


def work(output: Path, options: argparse.Namespace) -> int:
    """Runs jobs until none is left or the budget is spent, and keeps the results file up to date.

    Returns: the exit status; 1 if the device is unusable and only a new process can go on.
    """
    end = time.perf_counter() + options.budget
    torch.manual_seed(0)
    found = results.read(output)
    bench = DryRun() if options.dry_run else Gpu(0.06 if options.quick else 0.15)
    found["environment"] = gpu_environment(bench)
    pending = [job for job in jobs(bench) if job.name not in found["begun"]]
    while pending and time.perf_counter() < end:
        job = pending.pop(0)
        found["begun"].append(job.name)
        found["not run"] = [job.name for job in pending]
        results.write(output, found)
        usable = _measure(job, bench, found)
        found["ceilings"] = bench.ceiling_report() or found["ceilings"]
        results.write(output, found)
        if not usable:
            return 1
        bench.clear()
    return 0


def _measure(job: Job, bench: Gpu, found: dict[str, Any]) -> bool:
    """Adds the rows and errors of a job to `found`. A candidate that made the device unusable is
    added to found["broken"] instead, and the next worker measures the job without it.

    Returns: whether the device is usable.
    """
    known = found["broken"].get(job.name, {})
    try:
        with torch.no_grad():
            case = job.build(bench, *job.arguments)
            left = [c for c in case.candidates if c.key not in known]
            measured = bench.measure(left, case.sets, case.touched)
        errors = known | measured.errors
        if not measured.samples:
            found["begun"].remove(job.name)
            found["broken"][job.name] = errors
            return False
        found["rows"] += [
            row.as_json() for row in rows_of(job, case, measured, 2 * bench.copy_bytes)
        ]
        found["errors"] += errors_of(job, case, errors)
        usable = True
    except Exception as error:
        shape = describe(job.shape, job.dtype, job.settings)
        found["errors"].append({"subject": job.op, "shape": shape, "error": error_text(error)})
        usable = bench.alive()
    found["reported"].append(job.name)
    return usable
