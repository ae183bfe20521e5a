"""The demo's training loop, for networks with and without exits, and prediction in batches.

`training/__init__.py` says why this is not the trainer's loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..base import ELFBase, ELFOutput
from ..data.digits import Digits, augment
from ..modes import mode


@dataclass(frozen=True)
class Schedule:
    """AdamW, a short warm-up and a cosine decay to zero; the last epoch is the result."""

    epochs: int = 40
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.1  # share of the steps


class EpochStats(NamedTuple):
    epoch: int  # 1-based
    loss: float  # mean over samples
    accuracy: float  # of the augmented training samples, each at the exit where it left
    exit_shares: list[float]  # [E]


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over the first share `warmup` of the steps, then a cosine from 1 to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def train(
    model: ELFBase,
    data: Digits,
    schedule: Schedule,
    *,
    seed: int,
    on_epoch: Callable[[EpochStats], None] = lambda stats: None,
) -> list[EpochStats]:
    """Trains `model` in place on `data` and leaves it in evaluation mode.

    `seed` fixes the order and the augmentation of the samples, so two networks trained with the
    same seed see the same batches. It does not change the initial weights.
    """
    N = len(data.targets)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay
    )
    steps = schedule.epochs * math.ceil(N / schedule.batch_size)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps, schedule.warmup)
    )
    history = []
    model.train()
    for epoch in range(1, schedule.epochs + 1):
        loss, correct = 0.0, 0
        exits = torch.zeros(len(model.stages), dtype=torch.int64)
        for batch in torch.randperm(N, generator=generator).split(schedule.batch_size):
            x, y = augment(data.images[batch], generator), data.targets[batch]
            out = model(x, y)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            scheduler.step()
            loss += out.loss.item() * len(batch)
            correct += int((out.prediction == y).sum())
            exits += torch.bincount(out.exit_index, minlength=len(exits))
        stats = EpochStats(epoch, loss / N, correct / N, (exits / N).tolist())
        history.append(stats)
        on_epoch(stats)
    model.eval()
    return history


def batches(data: Digits, batch_size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
    """(images [n, ...], targets [n]) in order."""
    return zip(data.images.split(batch_size), data.targets.split(batch_size), strict=True)


@torch.inference_mode()
def predict(model: ELFBase, images: Tensor, batch_size: int = 256) -> ELFOutput:
    """The model's outputs for images [N, ...] in evaluation mode, batch by batch, without loss."""
    with mode(model, training=False):
        outputs = [model(batch) for batch in images.split(batch_size)]
    return ELFOutput(
        logits=torch.cat([out.logits for out in outputs]),
        prediction=torch.cat([out.prediction for out in outputs]),
        confidence=torch.cat([out.confidence for out in outputs]),
        exit_index=torch.cat([out.exit_index for out in outputs]),
        loss=None,
    )
