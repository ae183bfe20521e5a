"""How much memory an inference needs, when half of the samples go on after each exit (Linux).

    python -m benchmarks.cpu.memory N CANDIDATE

The command prints the peak of one call in MB, above what the process held before the call. `rows`
runs it in a new process for every measurement: a process that has made a call keeps memory of it.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from elf_fast.bench import inference
from elf_fast.timing import Quartiles

from ..row import Row, quartiles_of_ratio
from .growth import MIDDLE, work_of

ROOT = Path(__file__).resolve().parents[2]


def rows(*, full: bool) -> Iterator[Row]:
    for N in (16, 256) if full else (256,):
        peaks = {
            candidate: [_peak_of_a_process(N, candidate) for _ in range(5 if full else 3)]
            for candidate in ("elf_fast", "reference", "full")
        }
        own = peaks["elf_fast"]
        for baseline in ("reference", "full"):
            row = Row(
                "memory", "elf_fast", baseline, f"ResNet-32, s = 0.5, N = {N}, peak",
                quartiles_of_ratio(peaks[baseline], own), None,
                {"subject": Quartiles.of(own), "baseline": Quartiles.of(peaks[baseline])}, "MB",
            )  # fmt: skip
            print(row.line(), flush=True)
            yield row


def _peak_of_a_process(N: int, candidate: str) -> float:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.cpu.memory", str(N), candidate]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return float(done.stdout)


def _peak(N: int, candidate: str) -> float:
    """MB that a call needs beyond what the process holds before it."""
    run = inference.candidates(work_of(**MIDDLE | {"N": N}))[candidate]
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the recorded peak
    held = _high_water()
    with torch.inference_mode():
        run()
    return (_high_water() - held) / 1e3


def _high_water() -> int:
    """The peak of this process in kB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+)", status)[1])


if __name__ == "__main__":
    print(_peak(int(sys.argv[1]), sys.argv[2]))
