"""Whole networks at inference on a GPU: elf_fast and what a user would run instead.

Candidates that do not synchronise run as one CUDA graph, as the operators do: the network without
exits, the oracle and the padded one. Candidates that synchronise (elf_fast, the reference, tuned
PyTorch) are called in a loop, so that the time of the host counts as well. Networks are compared
across these two groups. The results of the same code are checked sample by sample on the CPU; here
the number of samples that leave at every exit is checked.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from elf_fast.bench import inference
from elf_fast.bench.workload import InferenceWork, inference_work

from .. import rivals
from ..inputs import SMALL, Network, build, folded
from .cases import Call, Case
from .timing import BYTES, Candidate, Gpu

NETWORKS = {
    "ResNet-50": Network("torchvision/resnet50", 224, 1000),
    "ResNet-18": Network("torchvision/resnet18", 112, 1000),
    "ResNet-32": SMALL,
}
#: How far the number of samples that leave at an exit may be from the reference's, as a share of
#: the batch. Untrained networks are about equally sure of all samples. So rounding, which depends
#: on the batch size and the memory format, decides which samples leave, but hardly how many.
DIFFERENT = 0.1


def inference_case(
    bench: Gpu,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    compiled: bool,
    network: str,
    share: float,
) -> Case:
    model, _ = build(NETWORKS[network], 1)
    model = folded(model).to(bench.device, dtype)
    images = torch.randn(shape, device=bench.device, dtype=dtype)
    work = inference_work(model, images.to(memory_format=torch.channels_last), share)
    calls: dict[str, Any] = inference.runs(work)
    calls |= {
        "tuned PyTorch, graphs": rivals.tuned_torch_graphed(work),
        "padded": rivals.padded(work),
    }
    if find_spec("earlyon"):
        calls["earlyon, batched"] = rivals.earlyon_batched(work)
    unchecked = ("full", "oracle", "earlyon, batched")  # no sample leaves, or all leave together

    def candidate(name: str) -> Candidate:
        f = torch.inference_mode()(calls[name])

        def check(call: Call) -> None:
            out = call(0)
            if name not in unchecked:
                _check(work, out.exit_index if hasattr(out, "exit_index") else out[1])

        return Candidate("network", name, lambda i: f(), check, 0)

    return Case(
        [candidate(name) for name in calls],
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
