"""Tests of the tests: the emulated run of test_ops.py must fail for deliberately broken CUDA C++
kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import emulated_cuda
import pytest

#: Each mutation by its description: file, text, replacement, and the test that must fail.
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
    # Other seeds run the threads in other orders.
    assert any(is_found(sources, tests, seed) for seed in range(3))


def is_found(sources: Path, tests: str, seed: int) -> bool:
    """Whether a test fails with these sources."""
    suite = Path(__file__).with_name("test_ops.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", suite, "-k", f"emulated and {tests}"],
        env={
            **os.environ,
            "EMULATED_CUDA_SOURCES": str(sources),
            "ELF_FAST_SCHEDULE_SEED": str(seed),
            # A flag that is read too early must not hold the right value by chance: new memory is
            # filled with 0x55 (170 ^ 255), which says of every row that it survives.
            "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.perturb=170",
        },
        capture_output=True,
        text=True,
    )
    # A negative return code: a write out of bounds may crash the process. A mutation that does not
    # compile is an error of the fixture, not a failed test, so the assertion reports it.
    passed = done.returncode == 0
    assert passed or done.returncode < 0 or "1 failed" in done.stdout, done.stdout[-2000:]
    return not passed
