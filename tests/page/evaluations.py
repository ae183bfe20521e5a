"""A small network on random images, and its evaluation."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

pytest.importorskip("torchmetrics")

from elf_fast import ELF, ExitHead
from elf_fast.flops import count_flops
from elf_fast.losses import CrossEntropyLoss
from elf_fast.page.evaluating import evaluate
from elf_fast.runs.opening import Evaluation


class Images(torch.utils.data.TensorDataset):
    """[N, 3, 4, 4] in [-1, 1]."""

    @property
    def targets(self):
        return self.tensors[1]


def opened(class_counts, N=300, exits=3, width=8, seed=0, names=None) -> Evaluation:
    generator = torch.Generator().manual_seed(seed)
    C = len(class_counts)
    x = torch.rand(N, 3, 4, 4, generator=generator) * 2 - 1
    y = torch.randint(C, (N,), generator=generator)
    torch.manual_seed(seed)
    stages = [nn.Sequential(nn.Flatten(), nn.Linear(48, width))]
    stages += [nn.Linear(width, width) for _ in range(exits - 1)]
    heads = [ExitHead(width, C) for _ in stages]
    model = ELF(stages, heads, thresholds=1.2 / C, exit_loss=CrossEntropyLoss()).eval()
    y[::2] = model(x).prediction[::2]  # right for half of the images
    images = Images(x, y)
    return Evaluation(
        "test", 0, model, images, list(zip(x.split(64), y.split(64), strict=True)),
        names or [f"class {c}" for c in range(C)], list(class_counts),
        count_flops(model, x[:1]), contextlib.nullcontext,
    )  # fmt: skip


def evaluated(class_counts=(500, 200, 50, 5), name="runs/photos", *, batch=None, prior=None, **how):
    return evaluate(name, opened(class_counts, **how), batch=batch, prior=prior, seconds=0)
