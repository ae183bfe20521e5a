"""CIFAR-10-LT and CIFAR-100-LT: torchvision's CIFAR with a long-tailed training set."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from .images import ImageArray, Transform
from .longtail import choose
from .splits import DataError, Splits
from .transforms import Transforms, small_image_transforms


def cifar_lt(
    root: str | os.PathLike[str],
    classes: int = 10,
    *,
    imbalance: float = 100.0,
    profile: str = "exponential",
    validation_fraction: float = 0.0,
    seed: int = 0,
    transforms: Transforms | None = None,
    download: bool = False,
) -> Splits:
    """CIFAR-10-LT or CIFAR-100-LT (classes = 10 or 100) with the balanced test set of CIFAR.

    Seed 0 and validation_fraction 0 give the training sets of published results (see
    `long_tailed_subset`): 12,406 images for CIFAR-10 and 10,847 for CIFAR-100 at imbalance 100. A
    validation part makes the training set differ from these, because they use every image of class
    0. It is held out first, the same share of every class; the rest is made long-tailed.

    Args:
        root: the folder that holds the unpacked archive, cifar-10-batches-py or cifar-100-python.
        transforms: `small_image_transforms()` if None.
        download: fetch the archive into root if it is not there.

    Raises:
        DataError: the archive is not in root, or a file of it is damaged.
        ValueError: another argument is invalid; the message names it.
    """
    from torchvision import datasets

    if classes not in (10, 100):
        raise ValueError(f"classes: expected 10 or 100, got {classes!r}")
    cifar = datasets.CIFAR10 if classes == 10 else datasets.CIFAR100
    train, test = (_read(cifar, os.path.expanduser(root), part, download) for part in (True, False))
    transforms = transforms or small_image_transforms()
    targets = torch.tensor(train.targets)
    kept, held_out = choose(
        targets,
        imbalance=imbalance,
        profile=profile,
        validation_fraction=validation_fraction,
        seed=seed,
    )

    def select(indices: Tensor, transform: Transform) -> ImageArray:
        return ImageArray(train.data[indices.numpy()], targets[indices], transform)

    return Splits(
        train=select(kept, transforms.train),
        validation=None if held_out is None else select(held_out, transforms.evaluate),
        test=ImageArray(test.data, torch.tensor(test.targets), transforms.evaluate),
        class_names=train.classes,
    )


def _read(cifar: Any, root: str, train: bool, download: bool) -> Any:
    from torchvision.datasets.utils import check_integrity

    try:
        return cifar(root, train=train, download=download)
    except RuntimeError as error:
        files = [*cifar.train_list, *cifar.test_list, (cifar.meta["filename"], cifar.meta["md5"])]
        bad = [
            name
            for name, md5 in files
            if not check_integrity(os.path.join(root, cifar.base_folder, name), md5)
        ]
        raise DataError(
            f"root: expected the folder {cifar.base_folder} of {cifar.url} in {root}, but missing "
            f"or damaged: {', '.join(bad) or error}. Unpack the archive there, or call "
            "cifar_lt with download=True."
        ) from error
