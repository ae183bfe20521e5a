"""Figures of whole networks: inference and training steps, by the share of samples that goes on
after each exit. Nothing is timed whose result is wrong."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from elf_fast import ELF, backbones, from_backbone
from elf_fast.bench import inference, training
from elf_fast.bench.workload import inference_work, training_work

from .. import rivals
from ..row import Pair, Row, compare


class Network(NamedTuple):
    name: str  # as `backbones.create` takes it
    size: int  # of the images
    classes: int

    def __str__(self) -> str:
        return f"{self.name.rpartition('/')[2]}, {self.size}x{self.size}"


SMALL = Network("cifar_resnet32", 32, 10)
MIDDLE = Network("torchvision/resnet18", 32, 100)
LARGE = (Network("torchvision/resnet18", 112, 1000), Network("torchvision/resnet50", 112, 1000))


def build(network: Network, N: int) -> tuple[ELF, Tensor]:
    """An untrained ELF and a batch, channels-last; every exit of `backbones.default_exits`."""
    torch.manual_seed(0)
    layout = torch.channels_last
    backbone = backbones.create(network.name, network.classes).to(memory_format=layout)
    x = torch.randn(N, 3, network.size, network.size).to(memory_format=layout)
    exits = backbones.default_exits(backbone)
    return from_backbone(backbone, exits, network.classes, example_input=x[:1]), x


def folded(model: ELF) -> ELF:
    """A copy of `model` as one would serve it: BatchNorm folded into the convolutions of the
    stages. All that is timed at inference runs on these, the rivals as well."""
    model = copy.deepcopy(model).eval()
    model.stages = nn.ModuleList(fuse(stage) for stage in model.stages)
    return model


def inference_rows(*, full: bool) -> Iterator[Row]:
    batches = {SMALL: (1, 16, 64, 256), MIDDLE: (16, 64, 256)} if full else {SMALL: (16, 64)}
    batches |= {network: (64,) for network in LARGE} if full else {MIDDLE: (64,)}
    for network, sizes in batches.items():
        for N in sizes:
            model, images = build(network, N)
            model = folded(model)
            for share in (0.5, 0.8, 1.0) if N > 1 else (0.0, 1.0):
                yield from _inference(network, model, images, share, full)


def _inference(
    network: Network, model: ELF, images: Tensor, share: float, full: bool
) -> Iterator[Row]:
    N = len(images)
    work = inference_work(model, images, share)
    candidates = dict(inference.candidates(work))
    for name, rival in {
        "sceptic": rivals.sceptic(work),
        "padded": rivals.padded(work),
        "earlyon, batched": rivals.earlyon_batched(work),
        "earlyon, singly": rivals.earlyon_single(work),
    }.items():
        rivals.check(rival, work, exits=name != "earlyon, batched")
        candidates[name] = rival
    if N > 16:
        del candidates["earlyon, singly"]  # N times its time at N = 1
    asked = N >= 64 and network is not SMALL
    efficiency: Pair = ("elf_fast", "oracle", 0.97 if asked and share < 1 else None)
    whole: Pair = ("elf_fast", "full", 0.98 if asked and share == 1.0 else None)
    others: list[Pair] = [
        ("elf_fast", name, None)
        for name in candidates
        if name not in ("elf_fast", "oracle", "full")
    ]
    with torch.inference_mode():
        yield from compare(
            "inference", f"{network}, N = {N}, s = {share:g}", candidates,
            [efficiency, whole, *others], seconds=8 if full else 5,
        )  # fmt: skip


def training_rows(*, full: bool) -> Iterator[Row]:
    batches = {SMALL: (16, 32, 64, 128), MIDDLE: (16, 64, 128)} if full else {SMALL: (16, 64)}
    for network, sizes in batches.items():
        for N in sizes:
            for drop in (True, False):
                model, images = build(network, N)
                model.drop_exited = drop
                for share in (0.5, 1.0):
                    work = training_work(model, images, share)
                    least = None if not drop else 1.1 if network is SMALL and share < 1 else 1.0
                    faster = 1.0 if drop and share < 1 else None
                    yield from compare(
                        "training",
                        f"{network}, N = {N}, s = {share:g}, {'dropping' if drop else 'keeping'}",
                        training.candidates(work),
                        [("elf_fast", "reference", least), ("elf_fast", "full", faster),
                         ("elf_fast", "oracle", None), ("reference", "oracle", None)],
                        seconds=8 if full else 5,
                    )  # fmt: skip
