"""Tests of the tests: broken CUDA C++ kernels, which the emulated run of test_ops.py must find."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import emulated_cuda
import pytest

#: By what is broken: file, its text, what takes its place, and the tests that must fail.
MUTATIONS = {
    "a barrier is missing between writing the counts of the warps and adding them up": (
        "survivors.cuh",
        "    if (lane == 0) of_warp[warp] = n;\n    __syncthreads();\n",
        "    if (lane == 0) of_warp[warp] = n;\n",
        "test_exit_gate",
    ),
    "a row's place among the survivors is off by one": (
        "compact.cu",
        "    low += shares * step;\n",
        "    low += shares * step + 1;\n",
        "test_compact",
    ),
    "the last block scans before all of its own threads have written their flags": (
        "exit_gate.cu",
        "    }\n    __syncthreads();\n  }\n  scan_flags(",
        "    }\n  }\n  scan_flags(",
        "test_exit_gate",
    ),
}


@pytest.mark.skipif(not emulated_cuda.compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("broken", MUTATIONS)
def test_a_broken_kernel_is_found(broken, tmp_path):
    file, text, instead, tests = MUTATIONS[broken]
    sources = Path(shutil.copytree(emulated_cuda.SOURCES, tmp_path / "csrc"))
    kernel = sources / "cuda" / file
    assert kernel.read_text().count(text) == 1
    kernel.write_text(kernel.read_text().replace(text, instead))
    # Flags that were not written yet may by chance hold what will be written: other orders of the
    # threads have other luck.
    assert any(is_found(sources, tests, seed) for seed in range(3))


def is_found(sources: Path, tests: str, seed: int) -> bool:
    suite = Path(__file__).with_name("test_ops.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", suite, "-k", f"emulated and {tests}"],
        env={
            **os.environ,
            "EMULATED_CUDA_SOURCES": str(sources),
            "ELF_FAST_SCHEDULE_SEED": str(seed),
        },
        capture_output=True,
        text=True,
    )
    # A process that writes out of bounds may also just die. A kernel that does not compile is
    # no finding: that is an error of the fixture.
    passed = done.returncode == 0
    assert passed or done.returncode < 0 or "1 failed" in done.stdout, done.stdout[-2000:]
    return not passed
