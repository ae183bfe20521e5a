"""Makes the loss and the network of a run from its settings."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks, criteria
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
from ..memory import is_out_of_memory
from ..models import from_backbone
from ..modes import mode
from ..modules import ELF
from .config import TrainConfig
from .datasets import image_size
from .freezing import freeze_
from .values import renamed

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


def exit_loss(
    config: TrainConfig, class_counts: list[int], class_weights: Tensor | None = None
) -> LongTailLoss:
    """The loss of every exit, for class_counts [C] of the training data.

    class_weights [C]: those of the file in the settings; without them, ones in their place."""
    options = {"label_smoothing": config.label_smoothing}
    loss = _LOSSES[config.loss](config, class_counts, options)
    if config.class_weights is not None:
        loss.weight = torch.ones(len(class_counts)) if class_weights is None else class_weights
    if config.drw_epoch is None:
        return loss
    return DeferredReweighting(loss, class_counts, start_epoch=config.drw_epoch, beta=config.beta)


def network(
    config: TrainConfig,
    class_counts: list[int],
    class_weights: Tensor | None = None,
    *,
    check_training: bool = True,
) -> ELF:
    """The untrained network on the CPU; without exits, an ELF of one stage.

    The weights of the backbone follow from the seed and are the same with and without exits. A loss
    with margins (LDAM) gets cosine classifiers, temperatures that undo its scale, and its margins
    in the exit test of training: see `losses.LDAMLoss`.

    Args:
        class_weights: see `exit_loss`. A network that gets saved weights gets these with them.
        check_training: see `from_backbone`.

    Raises:
        ValueError, TypeError: the settings make no network, or not one from images of this size to
            logits.
    """
    torch.manual_seed(config.seed)
    C = len(class_counts)
    backbone = _backbone(config, C)
    _check_backbone(config, backbone, C)
    loss = exit_loss(config, class_counts, class_weights)
    has_margins = loss.margins is not None
    if has_margins:
        use_cosine_(backbone)
    if config.freeze_backbone is not None:
        freeze_(backbone, config.freeze_backbone)
    if not config.has_exits:
        weight = config.exit_weights[-1]
        return ELF([backbone], [nn.Identity()], exit_loss=loss, exit_weights=weight)
    size = image_size(config)
    exits = list(config.exits or default_exits(backbone))
    with renamed(backbone="model", example_input="model", conv="conv_heads", layout="exits"):
        model = from_backbone(
            backbone,
            exits,
            C,
            example_input=torch.zeros(2, 3, size, size),
            conv=config.conv_heads,
            check_training=check_training,
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


_IN_STAGE = re.compile(r"stages\.\d+\.(.+)")


def backbone_name(name: str) -> str | None:
    """What the backbone calls a parameter or buffer of an ELF; None for those of heads and for
    settings. Stages keep the backbone's own names."""
    found = _IN_STAGE.fullmatch(name)
    return found[1] if found else None


def _backbone(config: TrainConfig, classes: int) -> nn.Module:
    try:
        with renamed(name="model", depth="model: depth"):
            return create(config.model, classes, **config.model_kwargs)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if isinstance(error, OSError):
            options = f" with {config.model_kwargs}" if config.model_kwargs else ""
            why = f": {error}" if str(error) else ""  # timm's has no text if a file is missing
            raise ValueError(
                f"model: expected weights of {config.model}{options} that can be loaded, got "
                f"{type(error).__name__}{why}"
            ) from error
        # Networks raise anything for options that they do not take, such as KeyError.
        if config.model_kwargs and not isinstance(error, ModuleNotFoundError):
            raise ValueError(
                f"model_kwargs: expected options of {config.model}, got {config.model_kwargs} "
                f"({type(error).__name__}: {error})"
            ) from error
        raise


def _check_backbone(config: TrainConfig, backbone: nn.Module, classes: int) -> None:
    """Raises a ValueError unless the backbone makes logits [N, C] from the images of the run.

    Without exits it is checked in training mode, too, in which some networks return more than
    logits. With exits `from_backbone` refuses what is in the way of logits.
    """
    size = image_size(config)
    expected = f"model: expected a network from images [N, 3, {size}, {size}] to logits [N, C]"
    for training in (False,) if config.has_exits else (False, True):
        # A copy, and generators that are restored: training mode changes both.
        tried = copy.deepcopy(backbone) if training else backbone
        with torch.no_grad(), torch.random.fork_rng(devices=[]), mode(tried, training=training):
            try:
                logits = tried(torch.zeros(2, 3, size, size))
            except Exception as error:  # a network may raise anything for images that do not fit
                if is_out_of_memory(error):
                    raise
                raise ValueError(
                    f"{expected}, got {config.model}, which raises {type(error).__name__}: {error}"
                ) from error
        if not isinstance(logits, Tensor) or logits.shape != (2, classes):
            raise ValueError(
                f"{expected}, got {config.model}, which returns {_kind(logits)} for N = 2 and C = "
                f"{classes} in {'training' if training else 'evaluation'}"
            )


def _kind(value: Any) -> str:
    return checks.describe(value) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _train_thresholds(config: TrainConfig, loss: LongTailLoss, exits: int) -> Any:
    """The training thresholds. They are always set, even if equal to the inference thresholds,
    because calibration overwrites those. A loss with margins changes them: see
    `LongTailLoss.margin_thresholds`. No mixed image leaves, because it has no one right class."""
    if config.mixes:
        return criteria.find(config.criterion).off
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
