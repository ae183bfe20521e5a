"""Whole networks for `gpu.py`: elf_fast beside what a user would run instead, at inference.

What never waits for the host runs as one CUDA graph, as everything in `gpu.py` does: the network
without exits, the oracle and the padded one. What waits (elf_fast, the reference, the sceptic) is
called in a loop, and its time is that of the host as well; here the two are compared."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import figures_models as networks
import rivals
import torch
from gpu_cases import Call, Case
from gpu_timing import BYTES, Candidate, Gpu
from torch import Tensor

from elf_fast.bench import inference
from elf_fast.bench.workload import InferenceWork, inference_work

NETWORKS = {
    "ResNet-50": networks.Network("torchvision/resnet50", 224, 1000),
    "ResNet-18": networks.Network("torchvision/resnet18", 112, 1000),
    "ResNet-32": networks.SMALL,
}
#: Share of the samples that may leave elsewhere or be predicted otherwise than by the reference:
#: libraries sum in another order for another batch size, and rounding decides near a threshold.
DIFFERENT = 0.03


def network(
    bench: Gpu, shape: tuple[int, ...], dtype: torch.dtype, compiled: bool, name: str, share: float
) -> Case:
    model, _ = networks.build(NETWORKS[name], 1)
    model = networks.folded(model).to(bench.device, dtype)
    images = torch.randn(shape, device=bench.device, dtype=dtype)
    work = inference_work(model, images.to(memory_format=torch.channels_last), share)
    calls: dict[str, Any] = inference.runs(work)
    calls |= {"sceptic": rivals.sceptic_graphed(work), "padded": rivals.padded(work)}
    if find_spec("earlyon"):
        calls["earlyon, batched"] = rivals.earlyon_batched(work)
    with torch.inference_mode():
        truth = calls["reference"]()
    leaves_elsewhere = ("full", "oracle", "earlyon, batched")

    def checked(name: str) -> Candidate:
        f = torch.inference_mode()(calls[name])

        def check(call: Call) -> None:
            if name not in leaves_elsewhere:
                _check(call(0), truth.exit_index, truth.prediction)

        return Candidate("network", name, lambda i: f(), check, 0)

    return Case([checked(name) for name in calls], 1, int(BYTES), _shares(work))


def _check(out: Any, exit_index: Tensor, prediction: Tensor) -> None:
    found = (out.prediction, out.exit_index) if hasattr(out, "exit_index") else out
    other = (found[1] != exit_index) | (found[0] != prediction)
    limit = max(1.0, DIFFERENT * len(other))
    assert int(other.sum()) <= limit, f"{int(other.sum())} of {len(other)} samples differ"


def _shares(work: InferenceWork) -> dict[str, Any]:
    counts = torch.bincount(work.exit_index, minlength=len(work.model.stages))
    return {"left at the exits": counts.tolist()}
