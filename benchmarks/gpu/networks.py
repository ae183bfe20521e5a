"""Whole networks for `gpu.py`: elf_fast beside what a user would run instead, at inference.

What never waits for the host runs as one CUDA graph, as everything in `gpu.py` does: the network
without exits, the oracle and the padded one. What waits (elf_fast, the reference, the sceptic) is
called in a loop, and its time is that of the host as well; here the two are compared. The same code
is checked for its results on the CPU; here, whether as many leave at every exit."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from elf_fast.bench import inference
from elf_fast.bench.workload import InferenceWork, inference_work

from .. import rivals
from ..cpu import networks
from .cases import Call, Case
from .timing import BYTES, Candidate, Gpu

NETWORKS = {
    "ResNet-50": networks.Network("torchvision/resnet50", 224, 1000),
    "ResNet-18": networks.Network("torchvision/resnet18", 112, 1000),
    "ResNet-32": networks.SMALL,
}
#: Share of the samples by which the numbers that leave at an exit may differ from the reference's.
#: Untrained networks are about equally sure of all samples, so that the order in which a library
#: sums, other for another batch size or memory format, decides who leaves: but not how many.
DIFFERENT = 0.1


def network(
    bench: Gpu, shape: tuple[int, ...], dtype: torch.dtype, compiled: bool, name: str, share: float
) -> Case:
    model, _ = networks.build(NETWORKS[name], 1)
    model = networks.folded(model).to(bench.device, dtype)
    images = torch.randn(shape, device=bench.device, dtype=dtype)
    work = inference_work(model, images.to(memory_format=torch.channels_last), share)
    calls: dict[str, Any] = inference.runs(work)
    calls |= {"sceptic, graphs": rivals.sceptic_graphed(work), "padded": rivals.padded(work)}
    if find_spec("earlyon"):
        calls["earlyon, batched"] = rivals.earlyon_batched(work)
    alike = ("full", "oracle", "earlyon, batched")  # nobody leaves, or all at once

    def checked(who: str) -> Candidate:
        f = torch.inference_mode()(calls[who])

        def check(call: Call) -> None:
            out = call(0)
            if who not in alike:
                _check(work, out.exit_index if hasattr(out, "exit_index") else out[1])

        return Candidate("network", who, lambda i: f(), check, 0)

    return Case(
        [checked(who) for who in calls],
        1,
        int(BYTES),
        {"left at the exits": _left(work.exit_index, work)},
    )


def _left(exit_index: Tensor, work: InferenceWork) -> list[int]:
    return torch.bincount(exit_index, minlength=len(work.model.stages)).tolist()


def _check(work: InferenceWork, exit_index: Tensor) -> None:
    found, wanted = _left(exit_index, work), _left(work.exit_index, work)
    limit = max(1.0, DIFFERENT * len(exit_index))
    apart = max(abs(a - b) for a, b in zip(found, wanted, strict=True))
    assert apart <= limit, f"{found} samples leave at the exits, not {wanted}"
