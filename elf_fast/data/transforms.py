"""The usual augmentation for small and for large images, from torchvision.transforms.v2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .images import Transform
from .preprocessing import (
    CIFAR_MEAN,
    CIFAR_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Exactly,
    Preprocessing,
    normalise,
)


class Transforms(NamedTuple):
    """From an RGB image (PIL) to a float32 tensor [3, size, size]."""

    train: Transform
    evaluate: Transform  # a `Preprocessing`, unless the caller made the pair


def small_image_transforms(
    size: int = 32, *, mean: Sequence[float] = CIFAR_MEAN, std: Sequence[float] = CIFAR_STD
) -> Transforms:
    """For images of size x size pixels. In training they are shifted by up to size / 8 pixels, with
    zeros outside the image, and mirrored, both at random (He et al., arXiv 1512.03385, section
    4.2). An image of another size raises a ValueError."""
    from torchvision.transforms import v2

    evaluate = Preprocessing(size, "exact", mean=tuple(mean), std=tuple(std))
    augment = [Exactly(size), v2.RandomCrop(size, padding=size // 8), v2.RandomHorizontalFlip()]
    return Transforms(v2.Compose([*augment, *normalise(evaluate.mean, evaluate.std)]), evaluate)


def image_transforms(
    size: int = 224, *, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Transforms:
    """For images of any size. Training crops a random part of 8% to 100% of the area, scales it to
    size x size pixels and mirrors it at random. Evaluation scales the shorter side to 8/7 of size
    and crops the centre; of images more than `LONGEST` times as long as wide it scales the middle
    only."""
    from torchvision.transforms import v2

    evaluate = Preprocessing(size, mean=tuple(mean), std=tuple(std))
    augment = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
    return Transforms(v2.Compose([*augment, *normalise(evaluate.mean, evaluate.std)]), evaluate)
