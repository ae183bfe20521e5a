"""Makes the loss and the network of a run from its settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..backbones import create, default_exits
from ..classifiers import use_cosine_
from ..losses import (
    BalancedSoftmaxLoss,
    ClassBalancedLoss,
    CrossEntropyLoss,
    DeferredReweighting,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    LongTailLoss,
)
from ..models import from_backbone
from ..modules import ELF
from .config import TrainConfig
from .datasets import image_size

#: By name, a function of the settings, the class counts [C] and the arguments of all losses.
_LOSSES: dict[str, Callable[[TrainConfig, list[int], dict[str, Any]], LongTailLoss]] = {
    "cross_entropy": lambda config, counts, options: CrossEntropyLoss(**options),
    "focal": lambda config, counts, options: FocalLoss(config.gamma, **options),
    "class_balanced": lambda config, counts, options: ClassBalancedLoss(
        counts, beta=config.beta, **options
    ),
    "ldam": lambda config, counts, options: LDAMLoss(counts, scale=config.ldam_scale, **options),
    "balanced_softmax": lambda config, counts, options: BalancedSoftmaxLoss(counts, **options),
    "logit_adjusted": lambda config, counts, options: LogitAdjustedLoss(
        counts, tau=config.tau, **options
    ),
}


def exit_loss(config: TrainConfig, class_counts: list[int]) -> LongTailLoss:
    """The loss of every exit, for class_counts [C] of the training data."""
    options = {"label_smoothing": config.label_smoothing}
    loss = _LOSSES[config.loss](config, class_counts, options)
    if config.drw_epoch is None:
        return loss
    return DeferredReweighting(loss, class_counts, start_epoch=config.drw_epoch, beta=config.beta)


def network(config: TrainConfig, class_counts: list[int]) -> ELF:
    """The untrained network on the CPU; without exits, an ELF of one stage.

    The weights of the backbone follow from the seed and are the same with and without exits. A loss
    with margins (LDAM) gets cosine classifiers, temperatures that undo its scale, and its margins
    in the exit test of training: see `losses.LDAMLoss`.
    """
    torch.manual_seed(config.seed)
    C = len(class_counts)
    try:
        backbone = create(config.model, C, **config.model_kwargs)
    except TypeError as error:
        raise TypeError(
            f"model_kwargs: expected options of {config.model}, got {config.model_kwargs} ({error})"
        ) from error
    loss = exit_loss(config, class_counts)
    has_margins = loss.margins is not None
    if has_margins:
        use_cosine_(backbone)
    if not config.has_exits:
        weight = config.exit_weights[-1]
        return ELF([backbone], [nn.Identity()], exit_loss=loss, exit_weights=weight)
    size = image_size(config)
    exits = list(config.exits or default_exits(backbone))
    model = from_backbone(
        backbone,
        exits,
        C,
        example_input=torch.zeros(2, 3, size, size),
        conv=config.conv_heads,
        thresholds=_one_or_many(config.thresholds, len(exits)),
        train_thresholds=_train_thresholds(config, loss, len(exits)),
        temperatures=1 / loss.scale,
        criterion=config.criterion,
        exit_loss=loss,
        exit_weights=_one_or_many(config.exit_weights, len(exits) + 1),
        drop_exited=config.drop_exited,
    )
    if has_margins:
        for head in model.heads[:-1]:
            use_cosine_(head)
    return model


def _train_thresholds(config: TrainConfig, loss: LongTailLoss, exits: int) -> Any:
    """The training thresholds. They are always set, even if equal to the inference thresholds,
    because calibration overwrites those. A loss with margins changes them: see
    `LongTailLoss.margin_thresholds`."""
    thresholds = _one_or_many(config.train_thresholds or config.thresholds, exits)
    if loss.margins is None or config.criterion != "confidence":
        return thresholds
    with_margins = loss.margin_thresholds(torch.as_tensor(thresholds))
    return with_margins.expand(exits, -1) if with_margins.dim() == 1 else with_margins


def _one_or_many(values: Sequence[Any], exits: int) -> Any:
    """A number for all exits, or a list of `exits` entries. A single entry serves every exit."""
    only = values[0] if len(values) == 1 else None
    if isinstance(only, float):
        return only
    return [*values] if only is None else [only] * exits
