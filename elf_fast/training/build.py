"""From the settings of a run to its parts: data, loss, network, sampler, optimiser, schedule."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .. import data
from ..backbones import create, default_exits
from ..classifiers import use_cosine_
from ..data.digits import IMAGE_SIZE, Digits, augment
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
from ..samplers import ClassSampler, EpochSampler, InstanceSampler, ProgressiveSampler
from .config import TrainConfig


def load_splits(config: TrainConfig) -> data.Splits:
    """The data set of a run.

    Raises:
        data.DataError: it is not there, or not as it should be.
        ValueError: a setting that does not fit the data set.
    """
    tail: dict[str, Any] = {
        "imbalance": config.imbalance,
        "profile": config.imbalance_profile,
        "validation_fraction": config.validation_fraction,
        "seed": config.data_seed,
    }
    if config.dataset == "digits":
        return _digits(config)
    assert config.data_dir is not None
    if config.dataset in ("cifar10", "cifar100"):
        classes = int(config.dataset.removeprefix("cifar"))
        tail["imbalance"] = config.imbalance or 1.0
        return data.cifar_lt(config.data_dir, classes, **tail, transforms=_transforms(config))
    if config.dataset == "folder":
        return data.image_folder(config.data_dir, **tail, transforms=_transforms(config))
    if config.validation_fraction:
        raise ValueError(
            f"validation_fraction: expected 0 for {config.dataset}, whose lists say what is held "
            f"out, got {config.validation_fraction}"
        )
    lists = Path(config.lists or config.data_dir)
    if config.dataset == "lists":
        train, validation, test = (lists / f"{part}.txt" for part in ("train", "val", "test"))
        return data.from_lists(
            config.data_dir,
            train,
            validation if validation.exists() else None,
            test if test.exists() else None,
            transforms=_transforms(config),
        )
    return data.published(config.dataset, config.data_dir, lists, transforms=_transforms(config))


def image_size(config: TrainConfig) -> int:
    """Height and width of the network's input."""
    by_dataset = {"digits": IMAGE_SIZE, "cifar10": 32, "cifar100": 32}
    return config.img_size or by_dataset.get(config.dataset, 224)


def _transforms(config: TrainConfig) -> data.Transforms:
    cifar = config.dataset.startswith("cifar")
    kind = config.transforms or ("small" if cifar else "large")
    if cifar and kind == "small" and image_size(config) != 32:
        raise ValueError(
            f"img_size: expected 32 for {config.dataset} unless by transforms large, which scale, "
            f"got {config.img_size}"
        )
    make = data.small_image_transforms if kind == "small" else data.image_transforms
    return make(image_size(config))


class _DigitImages(Dataset[tuple[Tensor, int]]):
    """Digits with three equal channels, for networks made for colour."""

    def __init__(self, digits: Digits, *, augmented: bool) -> None:
        self.digits, self.augmented = digits, augmented
        self.targets = digits.targets

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, target = self.digits[index]
        if self.augmented:
            image = augment(image[None], torch.default_generator)[0]
        return image.expand(3, -1, -1), target


def _digits(config: TrainConfig) -> data.Splits:
    for name, only in (
        ("imbalance_profile", "exponential"), ("validation_fraction", 0.0), ("transforms", None),
        ("img_size", None),
    ):  # fmt: skip
        if getattr(config, name) != only:
            raise ValueError(f"{name}: expected {only} for digits, got {getattr(config, name)}")
    splits = data.long_tailed_digits(config.imbalance or 1.0, seed=config.data_seed)
    return data.Splits(
        train=_DigitImages(splits.train, augmented=True),
        validation=_DigitImages(splits.validation, augmented=False),
        test=_DigitImages(splits.test, augmented=False),
        class_names=splits.class_names,
    )


def exit_loss(config: TrainConfig, class_counts: list[int]) -> LongTailLoss:
    """The loss of every exit, for class_counts [C] of the training data."""
    smoothing: dict[str, Any] = {"label_smoothing": config.label_smoothing}
    loss: LongTailLoss
    if config.loss == "cross_entropy":
        loss = CrossEntropyLoss(**smoothing)
    elif config.loss == "focal":
        loss = FocalLoss(config.gamma, **smoothing)
    elif config.loss == "class_balanced":
        loss = ClassBalancedLoss(class_counts, beta=config.beta, **smoothing)
    elif config.loss == "ldam":
        loss = LDAMLoss(class_counts, scale=config.ldam_scale, **smoothing)
    elif config.loss == "balanced_softmax":
        loss = BalancedSoftmaxLoss(class_counts, **smoothing)
    else:
        loss = LogitAdjustedLoss(class_counts, tau=config.tau, **smoothing)
    if config.drw_epoch is None:
        return loss
    return DeferredReweighting(loss, class_counts, start_epoch=config.drw_epoch, beta=config.beta)


def network(config: TrainConfig, class_counts: list[int]) -> ELF:
    """The untrained network on the CPU; without exits, an ELF of one stage.

    The weights of the backbone follow from the seed and are the same with and without exits.
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
    if config.loss == "ldam":
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
        thresholds=_one_or_many(config.thresholds),
        train_thresholds=_train_thresholds(config, loss, len(exits)),
        temperatures=1 / loss.scale,
        criterion=config.criterion,
        exit_loss=loss,
        exit_weights=_one_or_many(config.exit_weights),
        drop_exited=config.drop_exited,
    )
    if config.loss == "ldam":
        for head in model.heads[:-1]:
            use_cosine_(head)
    return model


def _train_thresholds(config: TrainConfig, loss: LongTailLoss, exits: int) -> Any:
    """Given even where they are those of inference, which calibration moves. Under a loss with
    margins the test in training has them, too."""
    thresholds = _one_or_many(config.train_threshold or config.thresholds)
    if loss.margins is None or config.criterion != "confidence":
        return thresholds
    with_margins = loss.margin_thresholds(thresholds)
    return with_margins.expand(exits, -1) if with_margins.dim() == 1 else with_margins


def _one_or_many(values: tuple[float, ...]) -> float | list[float]:
    return values[0] if len(values) == 1 else list(values)


def epoch_sampler(config: TrainConfig, targets: Tensor) -> EpochSampler:
    """The order of the training samples with classes `targets` [N], for this rank."""
    if config.sampler == "instance":
        return InstanceSampler(targets, seed=config.seed)
    if config.sampler == "progressive":
        return ProgressiveSampler(targets, config.epochs, seed=config.seed)
    q = 0.0 if config.sampler == "class_balanced" else 0.5
    return ClassSampler(targets, q, seed=config.seed)


def optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimiser of that name, without weight decay on vectors and scalars.

    Raises:
        ValueError: timm knows no such optimiser, or it refuses its settings.
    """
    from timm.optim import create_optimizer_v2

    try:
        return create_optimizer_v2(
            model,
            opt=config.opt,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
    except ValueError as error:
        raise ValueError(
            f"opt: expected an optimiser that timm can make, got {config.opt!r} ({error})"
        ) from error


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Of a step, counted from 0 over the whole run: linear up to lr in the warm-up, then
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
