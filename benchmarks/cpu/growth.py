"""How time and memory of inference grow with N, C and the number of exits, when half of the samples
go on after each. Memory: the peak of a process of its own, above what it held before the call."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from elf_fast import backbones, from_backbone
from elf_fast.bench import inference
from elf_fast.bench.timing import Quartiles
from elf_fast.bench.workload import InferenceWork, inference_work

from ..row import Row, compare

#: Where the others stay while one grows.
MIDDLE = {"N": 64, "C": 100, "exits": 2}


def _work(N: int, C: int, exits: int) -> InferenceWork:
    """ResNet-32 on 32x32 images; its 15 blocks take exits evenly."""
    torch.manual_seed(0)
    backbone = backbones.CifarResNet(32, C).to(memory_format=torch.channels_last)
    blocks = [f"layer{i}.{j}" for i in (1, 2, 3) for j in range(5)]
    names = [blocks[15 * (e + 1) // (exits + 1) - 1] for e in range(exits)]
    x = torch.randn(N, 3, 32, 32).to(memory_format=torch.channels_last)
    return inference_work(from_backbone(backbone, names, C, example_input=x[:1]), x, 0.5)


def rows(*, full: bool) -> Iterator[Row]:
    for axis, values in {
        "N": (1, 4, 16, 64, 256, 1024) if full else (4, 64),
        "C": (10, 100, 1000, 8142) if full else (10, 1000),
        "exits": (1, 2, 4, 8, 14) if full else (1, 8),
    }.items():
        for value in values:
            work = _work(**MIDDLE | {axis: value})
            candidates: dict[str, Callable[[], Any]] = inference.candidates(work)
            with torch.inference_mode():
                yield from compare(
                    "growth", f"ResNet-32, s = 0.5, {axis} = {value}", candidates,
                    [("elf_fast", name, None) for name in ("reference", "full", "oracle")],
                    seconds=10 if full else 3,
                )  # fmt: skip


def memory_rows(*, full: bool) -> Iterator[Row]:
    for N in (16, 256) if full else (256,):
        peaks = {
            who: [_peak_of_a_process(N, who) for _ in range(5 if full else 3)]
            for who in ("elf_fast", "reference", "full")
        }
        for baseline in ("reference", "full"):
            pairs = zip(peaks[baseline], peaks["elf_fast"], strict=True)
            needs = {"subject": peaks["elf_fast"], "baseline": peaks[baseline]}
            row = Row(
                "memory", "elf_fast", baseline, f"ResNet-32, s = 0.5, N = {N}, peak",
                Quartiles.of([b / a for b, a in pairs]), None,
                {name: Quartiles.of(values) for name, values in needs.items()}, "MB",
            )  # fmt: skip
            print(row.line(), flush=True)
            yield row


def _peak_of_a_process(N: int, who: str) -> float:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.cpu.growth", str(N), who]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    return float(done.stdout)


def _peak(N: int, who: str) -> float:
    """MB that a call needs beyond what is held before it (Linux)."""
    run = inference.candidates(_work(**MIDDLE | {"N": N}))[who]
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    held = _high_water()
    with torch.inference_mode():
        run()
    return (_high_water() - held) / 1e3


def _high_water() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+)", status)[1])


if __name__ == "__main__":
    print(_peak(int(sys.argv[1]), sys.argv[2]))
