"""The optimiser of a run and its learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import depths
from ..modules import ELF
from ..runs.config import TrainConfig
from ..runs.networks import backbone_name
from ..samplers import ClassSampler, EpochSampler, InstanceSampler, ProgressiveSampler


def optimizer(config: TrainConfig, model: ELF) -> torch.optim.Optimizer:
    """timm's optimiser of that name for the parameters that train, without weight decay on vectors
    and scalars. With `layer_decay`, every group has the factor on its rate as `lr_scale`.

    Raises:
        ValueError: timm knows no such optimiser, or it refuses its settings; or `layer_decay` finds
            no stages in the network.
    """
    from timm.optim import create_optimizer_v2

    by_depth = None if config.layer_decay == 1.0 else _groups(config, model)
    try:
        made = create_optimizer_v2(
            by_depth or model,
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


def _groups(config: TrainConfig, model: ELF) -> list[dict[str, Any]]:
    """The parameters that train, by depth and by whether weight decay applies to them. timm's own
    groups by depth need the names of its networks, without stages and heads."""
    undecayed = model.no_weight_decay()
    scales = layer_scales(config, model)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith(".bias") and name not in undecayed
            groups.setdefault((scales[name], decays), []).append(parameter)
    return [
        {"params": groups[key], "lr_scale": key[0], "weight_decay": config.weight_decay * key[1]}
        for key in sorted(groups)
    ]


def layer_scales(config: TrainConfig, model: ELF) -> dict[str, float]:
    """By name, the factor on the learning rate of every parameter: 1 for heads and what comes
    behind the network's n stages or blocks, layer_decay^(n + 1 - k) for the k-th, and
    layer_decay^(n + 1) for what comes before, as in timm.

    Raises:
        ValueError: the network's stages or blocks have no usual names.
    """
    scales = dict.fromkeys((name for name, _ in model.named_parameters()), 1.0)
    names = {name: backbone_name(name) for name in scales}
    found = depths([name for name in names.values() if name is not None])
    behind = max(found.values())
    for name, inner in names.items():
        if inner is not None:
            scales[name] = config.layer_decay ** (behind - found[inner])
    return scales


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
