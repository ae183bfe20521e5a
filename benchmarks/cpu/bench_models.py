"""Whole networks, in one group per batch size and share of samples that goes on after an exit.

python -m pytest benchmarks/cpu/bench_models.py --benchmark-only
"""

from __future__ import annotations

import pytest
import torch

from elf_fast.bench import inference, training
from elf_fast.bench.workload import inference_work, training_work
from elf_fast.modules import unfuse

from .. import rivals
from ..inputs import SMALL, build, folded

SIZES = (16, 64)
SHARES = (0.5, 1.0)
CANDIDATES = ("elf_fast", "reference", "torch.compile", "tuned PyTorch", "full", "oracle")


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("N", SIZES)
@pytest.mark.parametrize("candidate", CANDIDATES)
def test_inference(benchmark, N, share, candidate):
    if candidate == "torch.compile" and (N, share) != (64, 0.5):
        pytest.skip("compiling takes a minute, so only one case is timed")
    benchmark.group = f"inference, {SMALL}, N = {N}, s = {share}"
    model, images = build(SMALL, N)
    work = inference_work(folded(model), images, share)
    candidates = dict(inference.candidates(work))
    candidates["tuned PyTorch"] = rivals.tuned_torch(work)
    rivals.check(candidates["tuned PyTorch"], work)
    if candidate == "torch.compile":
        candidates[candidate] = compiled(work)
    with torch.inference_mode():
        candidates[candidate]()
        benchmark(candidates[candidate])


def compiled(work):
    """The reference, with every stage compiled by torch.compile."""
    plain = unfuse(work.model)
    plain.stages = torch.nn.ModuleList(torch.compile(s, dynamic=True) for s in plain.stages)

    def run():
        out = plain(work.images)
        return out.prediction, out.exit_index

    rivals.check(run, work)
    return run


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("N", SIZES)
@pytest.mark.parametrize("candidate", ["elf_fast", "reference", "full", "oracle"])
def test_training_step(benchmark, N, share, candidate):
    benchmark.group = f"training step, {SMALL}, N = {N}, s = {share}"
    work = training_work(*build(SMALL, N), share)
    benchmark(training.candidates(work)[candidate])
