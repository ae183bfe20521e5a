"""Makes the images of a run from its settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .. import data
from ..backbones import Statistics, statistics
from ..data.digits import IMAGE_SIZE, Digits, augment
from ..data.preprocessing import CIFAR_MEAN, CIFAR_STD, IMAGENET_MEAN, IMAGENET_STD
from .config import TrainConfig
from .values import renamed


def load_splits(config: TrainConfig) -> data.Splits:
    """The data set of a run.

    Raises:
        data.DataError: it is missing, incomplete or malformed.
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
    with renamed(root="data_dir", classes="data_dir"):
        return _from_disk(config, config.data_dir, tail)


def load_test(config: TrainConfig, class_names: list[str]) -> data.LabelledImages | None:
    """The test part of a folder that has no training images any more; None for another data set.

    Args:
        class_names: [C] of the training images that were there.

    Raises:
        data.DataError: the test part is malformed.
    """
    if config.dataset != "folder":
        return None
    assert config.data_dir is not None
    with renamed(root="data_dir"):
        return data.folder.test_images(
            config.data_dir,
            class_names,
            transforms=_transforms(config),
            exif_orientation=config.exif_orientation,
        )


def _from_disk(config: TrainConfig, root: str, tail: dict[str, Any]) -> data.Splits:
    transforms = _transforms(config)
    exif: dict[str, Any] = {"exif_orientation": config.exif_orientation}
    if config.is_cifar:
        classes = int(config.dataset.removeprefix("cifar"))
        tail["imbalance"] = config.imbalance or 1.0
        return data.cifar_lt(root, classes, **tail, transforms=transforms)
    if config.dataset == "folder":
        return data.image_folder(root, **tail, **exif, transforms=transforms)
    lists = Path(config.lists or root)
    if config.dataset == "lists":
        train, validation, test = (lists / f"{part}.txt" for part in ("train", "val", "test"))
        return data.from_lists(
            root,
            train,
            validation if validation.exists() else None,
            test if test.exists() else None,
            **exif,
            transforms=transforms,
        )
    return data.published(config.dataset, root, lists, **exif, transforms=transforms)


def image_size(config: TrainConfig) -> int:
    """Height and width of the network's input, in pixels."""
    by_dataset = {"digits": IMAGE_SIZE, "cifar10": 32, "cifar100": 32}
    return config.img_size or by_dataset.get(config.dataset, 224)


def blank_image(config: TrainConfig, device: torch.device) -> Tensor:
    """An image [1, 3, H, W] of zeros, to count FLOPs with."""
    size = image_size(config)
    return torch.zeros(1, 3, size, size, device=device)


def preprocessing(config: TrainConfig) -> data.Preprocessing:
    """How an image of the run becomes the input of its network at evaluation."""
    if config.dataset == "digits":
        return digit_preprocessing(channels=3)
    evaluate = _transforms(config).evaluate
    assert isinstance(evaluate, data.Preprocessing)
    return replace(evaluate, exif_orientation=config.exif_orientation)


def digit_preprocessing(channels: int) -> data.Preprocessing:
    """What `data.digits` does: 8x8 pixels are enlarged, and black becomes -1 and white 1."""
    half = (0.5,) * channels
    return data.Preprocessing(IMAGE_SIZE, "squash", mean=half, std=half)


def _transforms(config: TrainConfig) -> data.Transforms:
    mean, std, interpolation = _statistics(config)
    augmentation = data.Augmentation(
        config.hflip, (config.scale[0], config.scale[1]), config.auto_augment, config.reprob
    )
    common: dict[str, Any] = {"mean": mean, "std": std, "augmentation": augmentation}
    if config.has_small_images:
        return data.small_image_transforms(image_size(config), **common)
    return data.image_transforms(image_size(config), **common, interpolation=interpolation)


def _statistics(config: TrainConfig) -> tuple[Any, Any, Any]:
    """Mean, std and interpolation as the settings say, else those of the pretrained weights, else
    those of CIFAR for small images and of ImageNet for others."""
    if config.pretrained:
        found = pretrained_statistics(config)
    elif config.has_small_images:
        found = Statistics(CIFAR_MEAN, CIFAR_STD, "bilinear")
    else:
        found = Statistics(IMAGENET_MEAN, IMAGENET_STD, "bilinear")
    return (
        config.mean or found.mean,
        config.std or found.std,
        config.interpolation or found.interpolation,
    )


def pretrained_statistics(config: TrainConfig) -> Statistics:
    """Of the weights that --pretrained loads.

    Raises:
        ValueError: the network has no published weights.
    """
    try:
        return statistics(config.model)
    except ValueError as error:
        raise ValueError(f"pretrained: {str(error).removeprefix('name: ')}") from error


class _DigitImages(Dataset[tuple[Tensor, int]]):
    """Digits with three equal channels, for networks that expect colour images."""

    def __init__(self, digits: Digits, *, augmented: bool) -> None:
        self.digits, self.augmented = digits, augmented
        self.targets = digits.targets

    def __len__(self) -> int:
        return len(self.digits)

    def keys(self) -> list[bytes]:
        return self.digits.keys()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, target = self.digits[index]
        if self.augmented:
            image = augment(image[None], torch.default_generator)[0]
        return image.expand(3, -1, -1), target


def _digits(config: TrainConfig) -> data.Splits:
    splits = data.long_tailed_digits(config.imbalance or 1.0, seed=config.data_seed)
    return data.Splits(
        train=_DigitImages(splits.train, augmented=True),
        validation=_DigitImages(splits.validation, augmented=False),
        test=_DigitImages(splits.test, augmented=False),
        class_names=splits.class_names,
    )
