"""The stand-in for CUDA runs correct kernels correctly and detects errors that a GPU may not show.

A mutant of a case in cuda_on_cpu/selftest.cpp lacks one synchronisation or misuses a primitive.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SHIM = Path(__file__).parent / "cuda_on_cpu"
FLAGS = "-x c++ -std=c++20 -O2 -Wall -Wextra -Werror -fno-strict-aliasing".split()
SEEDS = range(8)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module")
def selftest(tmp_path_factory):
    """A function (case, mutant, seed) that runs the program and returns the lines it prints."""
    program = tmp_path_factory.mktemp("shim") / "selftest"
    command = ["g++", *FLAGS, f"-I{SHIM}", str(SHIM / "selftest.cpp"), "-o", str(program)]
    subprocess.run(command, check=True, timeout=300)

    def run(case: str, mutant: int = 0, seed: int = 0) -> list[str]:
        settings = {"ELF_FAST_SCHEDULE_SEED": str(seed), "ELF_FAST_LAUNCH_SECONDS": "0.5"}
        done = subprocess.run(
            [str(program), case, str(mutant)],
            env=os.environ | settings,
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout.splitlines()

    return run


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", ["sum", "exchange"])
def test_synchronised_kernels_are_right(selftest, case, seed):
    lines = selftest(case, seed=seed)
    assert lines and set(lines) == {"1"}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mutant", [1, 2], ids=["before reading", "before writing again"])
@pytest.mark.parametrize("case", ["sum", "exchange"])
def test_a_dropped_barrier_shows(selftest, case, mutant, seed):
    assert "0" in selftest(case, mutant, seed)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (1, r"lane 7 of warp \d exited, but lane \d+ waits for it in __shfl_sync \(selftest.cpp:"),
        (2, r"lane 7 .* waits at __syncthreads .*, but lane \d+ waits for it in __shfl_sync"),
        (3, r"barrier divergence: lane \d+ of warp \d waits at selftest.cpp:\d+, others wait at "),
        (4, r"lane \d+ .* waits in (__ballot|__shfl)_sync .*, but lane \d+ waits for it in "),
        (5, r"lane \d+ of warp \d reads lane \d+ in __shfl_sync .*, which takes no part: mask ff"),
        (6, r"lane \d+ of warp \d runs without end"),
        (7, r"lane \d+ of warp \d runs without end"),
        (8, r"lane 5 of warp 0 called __trap"),
        (9, r"lane \d+ of warp \d is not in the mask 1 of its __syncwarp"),
    ],
)
def test_misuse_is_reported(selftest, mutant, message, seed):
    (line,) = selftest("misuse", mutant, seed)
    assert re.match(r"block \(0, 0, 0\): " + message, line), line


def test_no_misuse_no_report(selftest):
    assert selftest("misuse") == ["no error"]


def test_parts_of_warps_and_early_exits(selftest):
    everyone = 1000 * 20 + 100000  # 20 votes in __syncthreads_count, all in __syncthreads_and
    minimum, maximum, votes = -15, 31, 0b10101010
    expected = [everyone + minimum] * 16 + [everyone + maximum] * 16 + [everyone + votes, votes] * 4
    assert selftest("allowed")[0].split() == [str(value) for value in expected]


def test_shared_memory_starts_poisoned_in_every_block(selftest):
    assert selftest("poison") == ["1"]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_last_block_sees_all_others(selftest, seed):
    assert selftest("last_block", seed=seed) == [str(37 * 38 // 2)]


def test_misaligned_load(selftest):
    fine, error = selftest("misaligned")
    assert fine == "fine"
    assert "misaligned address in __ldcg" in error and "for 16 bytes" in error


def test_blocks_run_in_an_order_of_the_seed(selftest):
    orders = [tuple(selftest("order", seed=seed)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    launches = [[int(b) for b in line.split()] for line in orders[0]]
    assert launches[0] != launches[1]
    assert sorted(launches[0]) == sorted(launches[1]) == list(range(16))
