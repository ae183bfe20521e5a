"""The figures that the GPU kernels are held to, measured in one run and printed with their limits.

    python benchmarks/gpu.py --output benchmarks/results/NAME.json [--quick] [--budget SECONDS]
    python benchmarks/gpu.py --show benchmarks/results/NAME.json

`gpu_timing.py` says how a time is taken, `gpu_cases.py` what is timed. Rows whose figures are asked
for come first, so that a short budget drops only what informs. A row that misses its figure, a
candidate that is wrong and one that fails are printed like the others. The work is done in a second
process: one that crashes, hangs or loses the device is started again, without the candidate that
did it. torch.compile, which takes seconds a shape, runs where a figure compares with it;
--compile-all runs it everywhere. --dry-run goes through all of it on tiny CPU tensors.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu_rows import Row, rows_of, show

HERE = Path(__file__).resolve()
#: Exit status of a worker that another one is to follow.
AGAIN = 75
#: Seconds that one candidate may take before it counts as hung, and that the shape in hand may take
#: when the budget is spent.
HUNG = 75.0
GRACE = 20.0


@dataclass
class Job:
    op: str
    shape: tuple[int, ...]
    dtype: str
    settings: dict[str, Any]
    build: Callable[..., Any]
    arguments: tuple[Any, ...]

    @property
    def name(self) -> str:
        settings = ", ".join(f"{k} {v}" for k, v in self.settings.items())
        return f"{self.op} {list(self.shape)} {self.dtype} {settings}"


def jobs(bench: Any, compile_all: bool) -> Iterator[Job]:
    """In the order of their weight; some come twice, and count once."""
    import gpu_cases as cases
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    limit = min(2**31, bench.memory // 32)

    def gate(N: int, C: int, dtype: str, criterion: str = "confidence", compiled: bool = False):
        shape, compiled = (N, C), compiled or compile_all
        return Job("exit_gate", bench.shrink(shape), dtype, {"criterion": criterion}, cases.gate,
                   (shape, dtypes[dtype], criterion, compiled))  # fmt: skip

    def loss(N: int, C: int, dtype: str, member: str, compiled: bool = True):
        shape, compiled = (N, C), compiled or compile_all
        return Job("exit_loss", bench.shrink(shape), dtype, {"loss": member}, cases.loss,
                   (shape, dtypes[dtype], member, compiled))  # fmt: skip

    def head(stage: str, N: int, C: int, dtype: str, layout="contiguous", compiled: bool = False):
        shape, compiled = (N, *cases.STAGES[stage]), compiled or compile_all
        settings = {"features": stage, "layout": layout, "classes": C}
        return Job("exit_head", bench.shrink(shape), dtype, settings, cases.head,
                   (shape, dtypes[dtype], layout, C, compiled))  # fmt: skip

    def compaction(stage: str, N: int, share: float, dtype="float32", layout="contiguous"):
        shape = (N, *cases.STAGES[stage])
        settings = {"features": stage, "layout": layout, "share": share}
        return Job("compact", bench.shrink(shape), dtype, settings, cases.compaction,
                   (shape, dtypes[dtype], layout, share))  # fmt: skip

    def in_order() -> Iterator[Job]:
        ResNet50, ViT = [s for s in cases.STAGES if "50" in s], "ViT-B"
        yield gate(256, 1000, "float32", compiled=True)
        for N, C, dtype in ((16384, 1000, "float32"), (8192, 8142, "float32"),
                            (8192, 8142, "bfloat16"), (65536, 1000, "bfloat16")):  # fmt: skip
            yield gate(N, C, dtype)
        for stage in (*ResNet50, ViT):
            yield compaction(stage, 256, 0.5)
        yield loss(256, 1000, "float32", "cross-entropy")
        yield loss(256, 1000, "float32", "all of it")
        for dtype, layout in itertools.product(("float32", "bfloat16"),
                                               ("contiguous", "channels_last")):  # fmt: skip
            yield head(
                "ResNet-50 layer4", 256, 1000, dtype, layout, compiled=layout == "contiguous"
            )
        yield head(ViT, 256, 1000, "float32", compiled=True)
        yield head(ViT, 256, 1000, "bfloat16")
        yield gate(256, 1000, "bfloat16", compiled=True)
        for N, C in itertools.product((1, 16, 64, 256), (10, 100, 1000)):
            yield gate(N, C, "float32")
        for stage in ("ResNet-50 layer1", "ResNet-50 layer4", ViT):
            for share in (0.1, 0.9, 1.0):
                yield compaction(stage, 256, share)
        for stage, N in itertools.product(("ResNet-50 layer2", "ResNet-50 layer4"), (256, 1024)):
            yield compaction(stage, N, 0.5, layout="channels_last")
            yield compaction(stage, N, 0.5, "bfloat16")
        for N, C in ((1024, 1000), (256, 8142), (4096, 100), (4096, 8142)):
            yield loss(N, C, "float32", "cross-entropy")
        yield loss(256, 1000, "bfloat16", "cross-entropy")
        yield loss(4096, 8142, "bfloat16", "cross-entropy")
        yield loss(4096, 8142, "float32", "all of it")
        yield head("ResNet-50 layer4", 256, 8142, "bfloat16")
        yield head("ResNet-50 layer4", 1024, 1000, "bfloat16", "channels_last")
        for criterion in ("margin", "entropy"):
            yield gate(256, 1000, "float32", criterion)
            yield gate(8192, 8142, "float32", criterion)
        # From here on no figure is asked for that rows above do not show.
        for N, C, dtype in itertools.product(
            (1, 16, 64, 256, 1024), (10, 100, 1000, 8142), ("float32", "bfloat16")
        ):
            yield gate(N, C, dtype)
        for N in (64, 256):
            yield head("ResNet-32 stage 3", N, 100, "float32")
            yield head("ResNet-50 layer4", 64, 1000, "float32")
        for (N, C), member in itertools.product(
            ((1024, 1000), (256, 8142), (4096, 100), (4096, 8142)), ("cross-entropy", "all of it")
        ):
            yield loss(N, C, "float32", member, compiled=False)
            yield loss(N, C, "bfloat16", member, compiled=False)
        for share, N, stage in itertools.product((0.5, 0.1, 0.9, 1.0), (64, 1024), cases.STAGES):
            yield compaction(stage, N, share)
            yield compaction(stage, N, share, "bfloat16")
            if stage != ViT:
                yield compaction(stage, N, share, layout="channels_last")

    seen = set()
    for job in in_order():
        elements = 1
        for n in job.shape:
            elements *= n
        if job.name not in seen and elements * dtypes[job.dtype].itemsize <= limit:
            seen.add(job.name)
            yield job


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


def work(output: Path, marker: Path, options: argparse.Namespace) -> int:
    """Runs jobs until none is left or the budget is spent; keeps the report up to date."""
    import torch
    from gpu_timing import DeviceLost, DryRun, Gpu, error_text

    end = time.perf_counter() + options.budget
    torch.manual_seed(0)
    report = json.loads(output.read_text())
    marker.write_text("\n")
    seconds = 0.06 if options.quick else 0.15
    bench = DryRun(seconds) if options.dry_run else Gpu(seconds)
    report["environment"] = environment(bench)
    report["torch.compile"] = "everywhere" if options.compile_all else "where a figure asks for it"
    pending = [job for job in jobs(bench, options.compile_all) if job.name not in report["done"]]

    def save() -> None:
        report["ceilings"] = bench.ceiling_report() or report["ceilings"]
        report["not run"] = [job.name for job in pending]
        written = output.with_suffix(".part")
        written.write_text(json.dumps(report, indent=1) + "\n")
        written.replace(output)

    save()
    with torch.no_grad():
        while pending and time.perf_counter() < end:
            job = pending[0]
            marker.write_text(f"{job.name}\n")
            failed = report["failed"].get(job.name, {})
            alive = True
            try:
                case = job.build(bench, *job.arguments)
                outcome = bench.measure(
                    case.candidates, case.sets, case.size, failed,
                    lambda name, job=job: marker.write_text(f"{job.name}\n{name}"),
                )  # fmt: skip
                rows = rows_of(job, case, outcome, bench.copy_bytes)
                case = outcome = None
            except DeviceLost as lost:
                report["failed"][job.name] = lost.errors
                save()
                return AGAIN
            except Exception as error:
                rows = [Row(job.op, "all", list(job.shape), job.dtype, job.settings,
                            error=error_text(error))]  # fmt: skip
                alive = bench.alive()
            pending.pop(0)
            report["rows"] += [asdict(row) for row in rows]
            report["done"].append(job.name)
            save()
            if not alive:
                return AGAIN
    return 0


def supervise(output: Path, options: argparse.Namespace) -> None:
    """Starts workers until one finishes; what kills or blocks one becomes an error in its row."""
    start = time.monotonic()
    empty: dict[str, Any] = {"environment": {}, "ceilings": {}, "rows": [], "done": [],
                             "failed": {}, "not run": []}  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(empty))
    with tempfile.TemporaryDirectory() as folder:
        marker = Path(folder) / "running"
        while (left := options.budget - (time.monotonic() - start)) > 0:
            marker.write_text("\n")
            command = [sys.executable, str(HERE), "--output", str(output), "--worker", str(marker),
                       "--budget", str(left)]  # fmt: skip
            for flag in ("quick", "dry_run", "compile_all"):
                command += [f"--{flag.replace('_', '-')}"] if getattr(options, flag) else []
            status = _watch(command, marker, start + options.budget + GRACE)
            if status == 0:
                break
            if status != AGAIN and not _blame(output, marker, status):
                break
    report = json.loads(output.read_text())
    for name in ("done", "failed"):
        report.pop(name)
    output.write_text(json.dumps(report, indent=1) + "\n")
    show(report)


def _watch(command: list[str], marker: Path, end: float) -> int | str:
    """The worker's exit status (0 if the time is up), or why it was stopped."""
    settings = {"TRITON_INTERPRET": "1"} if "--dry-run" in command else {}
    worker = subprocess.Popen(command, env=os.environ | settings)
    while True:
        try:
            return worker.wait(timeout=2.0)
        except subprocess.TimeoutExpired:
            idle = time.time() - marker.stat().st_mtime
            if idle > HUNG or time.monotonic() > end:
                worker.kill()
                worker.wait()
                return f"it hung for {idle:.0f} s" if idle > HUNG else 0


def _blame(output: Path, marker: Path, status: int | str) -> bool:
    """Notes what a dead worker was doing; False if that was nothing that can be left out."""
    job, _, candidate = marker.read_text().partition("\n")
    report = json.loads(output.read_text())
    why = status if isinstance(status, str) else f"the process ended with status {status}"
    print(f"{job or 'start'}: {candidate or 'all candidates'}: {why}", flush=True)
    if candidate:
        report["failed"].setdefault(job, {})[candidate] = why
    elif job:
        report["rows"].append(asdict(Row(job, "all", [], "", {}, error=why)))
        report["done"].append(job)
    else:
        report["rows"].append(asdict(Row("start", "all", [], "", {}, error=why)))
    output.write_text(json.dumps(report, indent=1) + "\n")
    return bool(job)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="the report as JSON")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds in all")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--compile-all", action="store_true", help="torch.compile at every shape")
    parser.add_argument("--dry-run", action="store_true", help="tiny CPU tensors, no GPU")
    parser.add_argument("--show", type=Path, help="print a report and end")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.show:
        show(json.loads(options.show.read_text()))
    elif options.output is None:
        parser.error("--output or --show is needed")
    elif options.worker:
        sys.exit(work(options.output, options.worker, options))
    else:
        supervise(options.output, options)


if __name__ == "__main__":
    main()
