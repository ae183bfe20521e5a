"""Runs every tool of NVIDIA's compute-sanitizer on the same list of calls of the CUDA C++ kernels.

    python -m benchmarks.gpu.sanitizer            all tools at once; status 1 if one finds an error
    python -m benchmarks.gpu.sanitizer --calls    only the calls; without a GPU on CPU tensors

Only kernels with elf_fast in their names are instrumented. Two settings make the tools see all
errors: every input is copied from the host as one block, never written by a kernel of torch, so
that initcheck knows what is initialised; and every tensor has an allocation of its own, so that
memcheck knows where it ends. Two calls that are wrong on purpose prove that memcheck and initcheck
find errors in these kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

import elf_fast
from elf_fast import criteria, functional, ops, reference

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
#: Tools with a call that is wrong on purpose, which they must find.
PLANTED = ("memcheck", "initcheck")
#: Exit status of the sanitizer when it finds errors, and of this command without a sanitizer.
FOUND, ABSENT = 9, 77

#: [N, C]: one element, odd sizes, less than a warp, a warp, a block or several blocks a row, many
#: rows.
GATES = (
    (1, 1), (3, 1), (7, 17), (33, 31), (16, 64), (9, 257), (4, 1000), (2, 8142), (1, 100_000),
    (300, 10), (5000, 3),
)  # fmt: skip
#: Shapes of a sample: odd sizes in bytes, several pieces a row, one word.
SAMPLES = ((5,), (9, 20), (8, 7, 7), (64, 14, 14), (3, 1, 1))
SURVIVORS: dict[str, Callable[[int], list[int]]] = {
    "none": lambda N: [],
    "all": lambda N: list(range(N)),
    "even": lambda N: list(range(0, N, 2)),
    "tail": lambda N: list(range(N // 2, N)),
}


def off_by_one(x: Tensor, device: str) -> Tensor:
    """x on the device, one element behind an aligned address."""
    return torch.cat([x.new_zeros(1), x.flatten()]).to(device)[1:].view(x.shape)


def wide_rows(x: Tensor, device: str) -> Tensor:
    """x [N, C] on the device, with a gap in memory after every row."""
    return torch.cat([x, x], dim=1).to(device)[:, : x.shape[1]]


def gates(device: str) -> None:
    layouts = itertools.cycle((lambda x, d: x.to(d), off_by_one, wide_rows))
    for (N, C), criterion, dtype in itertools.product(
        GATES, criteria.TABLE, (torch.float32, torch.bfloat16)
    ):
        logits = (torch.randn(N, C) * torch.linspace(0.1, 8.0, N)[:, None]).to(dtype)
        target = torch.randint(0, C, (N,)) if C % 2 else None
        gate = functional.exit_gate(
            next(layouts)(logits, device), 0.6, criterion=criterion,
            target=None if target is None else target.to(device),
        )  # fmt: skip
        truth = reference.exit_gate(logits.double(), 0.6, criterion=criterion, target=target)
        torch.testing.assert_close(gate.confidence.cpu().double(), truth.confidence,
                                   rtol=1e-5, atol=1e-6)  # fmt: skip
        assert torch.equal(gate.prediction.cpu(), truth.prediction)
        assert torch.equal(gate.survivors.cpu(), truth.survivors)


def compactions(device: str) -> None:
    N = 37
    for i, (shape, kept) in enumerate(itertools.product(SAMPLES, SURVIVORS)):
        x = torch.randn(N, *shape).to((torch.float32, torch.bfloat16)[i % 2])
        if len(shape) == 3 and i % 3 == 0:
            x = x.to(memory_format=torch.channels_last)
        placed = off_by_one(x, device) if i % 3 == 1 else x.to(device)
        rows = torch.tensor(SURVIVORS[kept](N), dtype=torch.int64)
        n = len(rows)
        padded = torch.cat([rows, torch.full((N - n,), N)]).to(device)
        survivors, count = rows.to(device), torch.tensor(n).to(device)

        assert torch.equal(functional.compact(placed, survivors).cpu(), x[rows])
        into = torch.full_like(x, -1.0)
        out = into.to(device, copy=True)
        ops.compact_into(out, placed, padded, count)
        assert torch.equal(out.cpu(), torch.cat([x[rows], into[n:]]))
        back = torch.zeros_like(x).index_copy_(0, rows, x[:n])
        grad = x[:n].to(device)
        assert torch.equal(ops.compact_backward(grad, survivors, N).cpu(), back)
        for chosen, counted in ((survivors, None), (padded, count)):
            moved = x.to(device, copy=True)
            order = ops.compact_(moved, chosen, counted).cpu()[:n]
            assert torch.equal(order.sort().values, rows)
            assert torch.equal(moved.cpu(), torch.cat([x[order], x[n:]]))


def planted(tool: str) -> None:
    """A call whose kernel reads past its allocation (memcheck) or reads memory that was never
    written (initcheck)."""
    logits = torch.randn(16, 64).to("cuda")
    if tool == "memcheck":
        logits.untyped_storage().resize_(64)
    else:
        logits = torch.empty(16, 64, device="cuda")
    functional.exit_gate(logits, 0.6)
    torch.cuda.synchronize()


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH, or in the toolkit that nvcc or CUDA_HOME names."""
    nvcc = os.path.realpath(shutil.which("nvcc") or "nvcc")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    folders = (os.environ.get("PATH", ""), os.path.dirname(nvcc), f"{home}/bin")
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def run_tool(sanitizer: str, tool: str, *arguments: str) -> tuple[int, float]:
    """Runs this module under a tool and prints its output. Returns its exit status and seconds."""
    start = time.monotonic()
    # torch asks the driver for symbols that it may lack, which is not an error of the kernels.
    quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
    process = subprocess.Popen(
        [sanitizer, "--tool", tool, *quiet, "--kernel-regex", "kns=elf_fast",
         "--error-exitcode", str(FOUND), "--print-limit", "20",
         sys.executable, "-m", "benchmarks.gpu.sanitizer", *arguments],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        print(f"{tool} {arguments[0]} | {line}", end="", flush=True)
    return process.wait(), time.monotonic() - start


def run_tools(sanitizer: str) -> int:
    jobs = [(tool, "--calls") for tool in TOOLS]
    jobs += [(tool, "--planted", tool) for tool in PLANTED]
    with ThreadPoolExecutor(len(jobs)) as pool:
        done = list(pool.map(lambda job: run_tool(sanitizer, *job), jobs))
    failed, said = False, []
    for (tool, kind, *_), (status, seconds) in zip(jobs, done, strict=True):
        if kind == "--calls":
            good = status == 0
            what = {0: "no error", FOUND: "errors"}.get(status, f"status {status}")
        else:
            good = status == FOUND
            what = "finds the planted error" if good else "MISSES the planted error"
        failed |= not good
        said.append(f"{tool} {what} ({seconds:.0f} s)")
        if not good:
            print(f"FAILED {tool}: {what}")
    print(", ".join(said))
    return int(failed)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.sanitizer", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--calls", action="store_true", help="only make the calls, without a tool")
    parser.add_argument("--planted", choices=PLANTED, help="make the call that a tool must find")
    options = parser.parse_args()
    if not options.calls and not options.planted:
        if (sanitizer := find_sanitizer()) is None:
            print("compute-sanitizer, a part of the CUDA toolkit, is neither on PATH nor with nvcc")
            return ABSENT
        return run_tools(sanitizer)
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    with elf_fast.use_backend("cuda") if on_gpu else contextlib.nullcontext():
        device = "cuda" if on_gpu else "cpu"
        if options.planted:
            planted(options.planted)
        else:
            gates(device)
            compactions(device)
            print(f"calls on {device} tensors: all results are right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
