"""How the time of inference grows with N, C and the number of exits, when half of the samples go on
after each exit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from elf_fast import backbones, from_backbone
from elf_fast.bench import inference
from elf_fast.bench.workload import InferenceWork, inference_work

from ..row import Row
from .compare import compare

#: The values of the two sizes that stay while the third one grows.
MIDDLE = {"N": 64, "C": 100, "exits": 2}


def work_of(N: int, C: int, exits: int) -> InferenceWork:
    """ResNet-32 on 32x32 images, with its exits evenly among its 15 blocks."""
    torch.manual_seed(0)
    backbone = backbones.CifarResNet(32, C).to(memory_format=torch.channels_last)
    blocks = [f"layer{i}.{j}" for i in (1, 2, 3) for j in range(5)]
    names = [blocks[15 * (e + 1) // (exits + 1) - 1] for e in range(exits)]
    x = torch.randn(N, 3, 32, 32).to(memory_format=torch.channels_last)
    return inference_work(from_backbone(backbone, names, C, example_input=x[:1]), x, 0.5)


def rows(*, full: bool) -> Iterator[Row]:
    for axis, values in {
        "N": (1, 4, 16, 64, 256, 1024) if full else (4, 64),
        "C": (10, 100, 1000, 8142) if full else (10, 1000),
        "exits": (1, 2, 4, 8, 14) if full else (1, 8),
    }.items():
        for value in values:
            work = work_of(**MIDDLE | {axis: value})
            candidates: dict[str, Callable[[], Any]] = inference.candidates(work)
            with torch.inference_mode():
                yield from compare(
                    "growth", f"ResNet-32, s = 0.5, {axis} = {value}", candidates,
                    [("elf_fast", name, None) for name in ("reference", "full", "oracle")],
                    seconds=10 if full else 3,
                )  # fmt: skip
