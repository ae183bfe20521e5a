"""Whole networks beside each other; one group per network, batch and share of samples that goes on.

pytest benchmarks/bench_models.py --benchmark-only
"""

from __future__ import annotations

import pytest
import torch

from elf_fast.bench import inference, training
from elf_fast.bench.workload import inference_work, training_work
from elf_fast.modules import unfuse

from .. import rivals
from . import networks

SIZES = (16, 64)
SHARES = (0.5, 1.0)


WHO = ("elf_fast", "reference", "torch.compile", "sceptic", "full", "oracle")


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("N", SIZES)
@pytest.mark.parametrize("who", WHO)
def test_inference(benchmark, N, share, who):
    if who == "torch.compile" and (N, share) != (64, 0.5):
        pytest.skip("compiling takes a minute: one case shows it")
    benchmark.group = f"inference, {networks.SMALL}, N = {N}, s = {share}"
    model, images = networks.build(networks.SMALL, N)
    work = inference_work(networks.folded(model), images, share)
    candidates = dict(inference.candidates(work))
    candidates["sceptic"] = rivals.sceptic(work)
    rivals.check(candidates["sceptic"], work)
    if who == "torch.compile":
        candidates[who] = compiled(work)
    with torch.inference_mode():
        candidates[who]()
        benchmark(candidates[who])


def compiled(work):
    """The reference with every stage compiled."""
    plain = unfuse(work.model)
    plain.stages = torch.nn.ModuleList(torch.compile(s, dynamic=True) for s in plain.stages)

    def run():
        out = plain(work.images)
        return out.prediction, out.exit_index

    rivals.check(run, work)
    return run


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("N", SIZES)
@pytest.mark.parametrize("who", ["elf_fast", "reference", "full", "oracle"])
def test_training_step(benchmark, N, share, who):
    benchmark.group = f"training step, {networks.SMALL}, N = {N}, s = {share}"
    work = training_work(*networks.build(networks.SMALL, N), share)
    benchmark(training.candidates(work)[who])
