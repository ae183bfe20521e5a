"""The optimiser of a run and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..runs.config import TrainConfig
from ..samplers import ClassSampler, EpochSampler, InstanceSampler, ProgressiveSampler


def optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimiser of that name, without weight decay on vectors and scalars.

    Raises:
        ValueError: timm knows no such optimiser, or it refuses its settings.
    """
    from timm.optim import create_optimizer_v2

    try:
        made = create_optimizer_v2(
            model,
            opt=config.opt,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
    except (ValueError, TypeError, AssertionError, RuntimeError, ImportError) as error:
        raise ValueError(
            f"opt: expected an optimiser that timm can make, got {config.opt!r} ({error})"
        ) from error
    if getattr(made, "is_second_order", False):  # timm's name for it; it needs create_graph
        raise ValueError(f"opt: expected an optimiser of first order, got {config.opt!r}")
    return made


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """The rate of a step, counted from 0 over the whole run: linear up to lr in the warm-up, then
    `step` (times decay_rate from every milestone on) or `cosine`,
    min_lr + (lr - min_lr) (1 + cos(pi t)) / 2 (Loshchilov and Hutter, arXiv 1608.03983, eq. 5),
    with t from 0 after the warm-up to 1 at the end."""
    rising = round(config.warmup_epochs * steps_per_epoch)
    if step < rising:
        return config.lr * (step + 1) / rising
    if config.sched == "step":
        passed = sum(step >= epoch * steps_per_epoch for epoch in config.decay_milestones)
        return config.lr * config.decay_rate**passed
    t = (step - rising) / max(1, config.epochs * steps_per_epoch - rising)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * t)) / 2


def epoch_sampler(config: TrainConfig, targets: Tensor) -> EpochSampler:
    """The order of the training samples with classes `targets` [N], for this process."""
    if config.sampler == "instance":
        return InstanceSampler(targets, seed=config.seed)
    if config.sampler == "progressive":
        return ProgressiveSampler(targets, config.epochs, seed=config.seed)
    q = 0.0 if config.sampler == "class_balanced" else 0.5
    return ClassSampler(targets, q, seed=config.seed)
