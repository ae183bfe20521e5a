"""What is measured on a GPU, the most important shapes first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch

from elf_fast import criteria

from .cases import STAGES, Case, compaction, gate, head, loss
from .networks import NETWORKS, inference_case
from .timing import Gpu

F32, BF16 = "float32", "bfloat16"
LAYOUTS = ("contiguous", "channels_last")
VIT = "ViT-B"
RESNET50 = [stage for stage in STAGES if "50" in stage]


@dataclass(frozen=True)
class Job:
    op: str
    build: Callable[..., Case]
    shape: tuple[int, ...]
    dtype: str
    settings: dict[str, Any]
    compiled: bool = False  # whether torch.compile is a candidate

    @property
    def name(self) -> str:
        settings = ", ".join(f"{k} {v}" for k, v in self.settings.items())
        return f"{self.op} {list(self.shape)} {self.dtype} {settings}"

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments of `build` after the first one."""
        return (self.shape, getattr(torch, self.dtype), self.compiled, *self.settings.values())


def _gate(N: int, C: int, dtype: str, criterion: str = "confidence", compiled: bool = False) -> Job:
    return Job("exit_gate", gate, (N, C), dtype, {"criterion": criterion}, compiled)


def _compact(
    stage: str, N: int, share: float, dtype: str = F32, layout: str = "contiguous",
    compiled: bool = False,
) -> Job:  # fmt: skip
    settings = {"layout": layout, "share": share, "features": stage}
    return Job("compact", compaction, (N, *STAGES[stage]), dtype, settings, compiled)


def _head(
    stage: str, N: int, C: int, dtype: str, layout: str = "contiguous", compiled: bool = False
) -> Job:
    settings = {"layout": layout, "classes": C, "features": stage}
    return Job("exit_head", head, (N, *STAGES[stage]), dtype, settings, compiled)


def _loss(N: int, C: int, dtype: str, member: str = "cross-entropy", compiled: bool = True) -> Job:
    return Job("exit_loss", loss, (N, C), dtype, {"loss": member}, compiled)


def _network(name: str, N: int, share: float, dtype: str = BF16) -> Job:
    shape = (N, 3, NETWORKS[name].size, NETWORKS[name].size)
    return Job("network", inference_case, shape, dtype, {"network": name, "share": share})


def _with_targets() -> Iterator[Job]:
    """Shapes whose rows have targets."""
    layer4 = "ResNet-50 layer4"
    yield _gate(256, 1000, F32, compiled=True)
    for N, C, dtype in ((16384, 1000, F32), (8192, 8142, F32), (8192, 8142, BF16),
                        (65536, 1000, BF16)):  # fmt: skip
        yield _gate(N, C, dtype)
    for stage in (*RESNET50, VIT):
        yield _compact(stage, 256, 0.5, compiled=stage == layer4)
    for member in ("cross-entropy", "all of it"):
        yield _loss(256, 1000, F32, member)
    for dtype, layout in product((F32, BF16), LAYOUTS):
        yield _head(layer4, 256, 1000, dtype, layout, compiled=layout == "contiguous")
    yield _head(VIT, 256, 1000, F32, compiled=True)
    yield _head(VIT, 256, 1000, BF16)
    yield _gate(256, 1000, BF16, compiled=True)
    for N, C in product((1, 16, 64, 256), (10, 100, 1000)):
        yield _gate(N, C, F32)
    for stage, share in product(("ResNet-50 layer1", layer4, VIT), (0.1, 0.9, 1.0)):
        yield _compact(stage, 256, share)
    for stage, N in product(("ResNet-50 layer2", layer4), (256, 1024)):
        yield _compact(stage, N, 0.5, layout="channels_last", compiled=(stage, N) == (layer4, 256))
        yield _compact(stage, N, 0.5, BF16)
    for N, C in ((1024, 1000), (256, 8142), (4096, 100), (4096, 8142)):
        yield _loss(N, C, F32)
    yield _loss(256, 1000, BF16)
    yield _loss(4096, 8142, BF16)
    yield _loss(4096, 8142, F32, "all of it")
    yield _head(layer4, 256, 8142, BF16)
    yield _head(layer4, 1024, 1000, BF16, "channels_last")
    for criterion in [name for name in criteria.TABLE if name != "confidence"]:
        yield _gate(256, 1000, F32, criterion)
        yield _gate(8192, 8142, F32, criterion)


def _without_targets() -> Iterator[Job]:
    """Whole networks, then the whole grid of shapes."""
    if find_spec("torchvision"):
        for N, share in product((64, 256, 16), (0.5, 0.8, 1.0)):
            yield _network("ResNet-50", N, share)
        yield _network("ResNet-18", 256, 0.5)
    for N, dtype in product((64, 256), (BF16, F32)):
        yield _network("ResNet-32", N, 0.5, dtype)
    for N, C, dtype in product((1, 16, 64, 256, 1024), (10, 100, 1000, 8142), (F32, BF16)):
        yield _gate(N, C, dtype)
    for N in (64, 256):
        yield _head("ResNet-32 stage 3", N, 100, F32)
    yield _head("ResNet-50 layer4", 64, 1000, F32)
    for (N, C), member, dtype in product(
        ((1024, 1000), (256, 8142), (4096, 100), (4096, 8142)),
        ("cross-entropy", "all of it"),
        (F32, BF16),
    ):
        yield _loss(N, C, dtype, member, compiled=False)
    for share, N, stage in product((0.5, 0.1, 0.9, 1.0, 0.0), (16, 64, 256, 1024), STAGES):
        yield _compact(stage, N, share)
        yield _compact(stage, N, share, BF16)
        if stage != VIT:
            yield _compact(stage, N, share, layout="channels_last")


def jobs(bench: Gpu) -> Iterator[Job]:
    """Every job once, without those whose tensors are too large for the device."""
    limit = min(2**31, bench.memory // 32)
    seen = set()
    for wanted in (*_with_targets(), *_without_targets()):
        job = replace(wanted, shape=bench.shrink(wanted.shape))
        size = math.prod(job.shape) * getattr(torch, job.dtype).itemsize
        if job.name not in seen and size <= limit:
            seen.add(job.name)
            yield job
