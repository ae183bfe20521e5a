"""A short form of the benchmarks, on one thread. Ratios within one run must reach half of the
target that benchmarks/cpu/targets.py has on a quiet machine, so that noise does not fail the tests
and a regression does."""

from __future__ import annotations

import pytest
import torch

import elf_fast
from elf_fast import functional, reference
from elf_fast.timing import sample


@pytest.fixture(autouse=True)
def one_thread():
    if elf_fast.report()["cpu"] != "cpu (C++)":
        pytest.skip("the CPU kernels are not built")
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a second thread would wait for other work on its core
    yield
    torch.set_num_threads(before)


def check(subject, baseline, target: float) -> None:
    """Tries three times. Other work on the machine takes memory bandwidth and caches and slows the
    faster candidate more; a regression fails all three tries."""
    ratios = []
    for _ in range(3):
        with torch.inference_mode():
            samples = sample({"subject": subject, "baseline": baseline}, seconds=0.5, least=20)
        ratios.append(samples.ratio("baseline", "subject").median)
        if ratios[-1] >= target / 2:
            return
    pytest.fail(f"expected {target / 2} times as fast, got {ratios}")


@pytest.mark.parametrize("N, C, target", [(16, 10, 2.0), (64, 100, 2.0), (256, 1000, 5.0)])
def test_exit_gate(N, C, target):
    z = torch.randn(N, C, generator=torch.Generator().manual_seed(0)) * 3
    ours, theirs = (lambda f=f: f(z, 0.9) for f in (functional.exit_gate, reference.exit_gate))
    assert torch.equal(ours().survivors, theirs().survivors)
    check(ours, theirs, target)


@pytest.mark.parametrize("layout, target", [("contiguous", 1.0), ("channels_last", 3.0)])
def test_compact(layout, target):
    """The target of 5 for channels-last is that of one processor; see docs/cpu-kernels.md."""
    x = torch.randn(64, 32, 8, 8)  # 0.5 MB: larger ones would time the memory of the machine
    x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
    survivors = torch.arange(0, 64, 2)
    check(lambda: functional.compact(x, survivors), lambda: x.index_select(0, survivors), target)
