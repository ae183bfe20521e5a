"""The shapes and the networks that more than one benchmark runs on."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from elf_fast import ELF, backbones, from_backbone

#: [N, C] of the logits of a gate or a loss.
LOGITS = ((16, 10), (64, 100), (256, 1000), (1024, 1000))


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
    """An untrained ELF with the exits of `backbones.default_exits`, and a batch. Both are
    channels-last."""
    torch.manual_seed(0)
    layout = torch.channels_last
    backbone = backbones.create(network.name, network.classes).to(memory_format=layout)
    x = torch.randn(N, 3, network.size, network.size).to(memory_format=layout)
    exits = backbones.default_exits(backbone)
    return from_backbone(backbone, exits, network.classes, example_input=x[:1]), x


def folded(model: ELF) -> ELF:
    """A copy of `model` for inference: the BatchNorms of the stages are folded into the
    convolutions. All inference benchmarks run on such copies, those of the baselines as well."""
    model = copy.deepcopy(model).eval()
    model.stages = nn.ModuleList(fuse(stage) for stage in model.stages)
    return model
