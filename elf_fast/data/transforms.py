"""The usual augmentation for small and for large images, from torchvision.transforms.v2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from .images import Transform
from .preprocessing import (
    CIFAR_MEAN,
    CIFAR_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Exactly,
    Interpolation,
    Preprocessing,
    normalise,
)

AutoAugment = Literal["autoaugment", "randaugment", "trivialaugment", "augmix"]


class Transforms(NamedTuple):
    """From an RGB image (PIL) to a float32 tensor [3, size, size]."""

    train: Transform
    evaluate: Transform  # a `Preprocessing`, unless the caller made the pair


@dataclass(frozen=True)
class Augmentation:
    """What training does to an image at random, beside shifts and crops.

    Args:
        hflip: probability of mirroring.
        scale: smallest and largest share of the area that a crop of a large image keeps.
        auto_augment: a policy of torchvision, with its defaults: AutoAugment (the one for
            ImageNet), RandAugment, TrivialAugmentWide or AugMix.
        erasing: probability of overwriting a rectangle by the mean colour (Zhong et al., arXiv
            1708.04896).
    """

    hflip: float = 0.5
    scale: tuple[float, float] = (0.08, 1.0)
    auto_augment: AutoAugment | None = None
    erasing: float = 0.0


def small_image_transforms(
    size: int = 32,
    *,
    mean: Sequence[float] = CIFAR_MEAN,
    std: Sequence[float] = CIFAR_STD,
    augmentation: Augmentation = Augmentation(),
) -> Transforms:
    """For images of size x size pixels. In training they are shifted by up to size / 8 pixels, with
    zeros outside the image, and mirrored, both at random (He et al., arXiv 1512.03385, section
    4.2). An image of another size raises a ValueError."""
    from torchvision.transforms import v2

    evaluate = Preprocessing(size, "exact", mean=tuple(mean), std=tuple(std))
    place = [Exactly(size), v2.RandomCrop(size, padding=size // 8)]
    return _pair(place, augmentation, evaluate)


def image_transforms(
    size: int = 224,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    interpolation: Interpolation = "bilinear",
    augmentation: Augmentation = Augmentation(),
) -> Transforms:
    """For images of any size. Training crops a random part, by default of 8% to 100% of the area,
    scales it to size x size pixels and mirrors it at random. Evaluation scales the shorter side to
    8/7 of size and crops the centre; of images more than `LONGEST` times as long as wide it scales
    the middle only."""
    from torchvision.transforms import v2

    evaluate = Preprocessing(size, interpolation=interpolation, mean=tuple(mean), std=tuple(std))
    mode = v2.InterpolationMode[interpolation.upper()]
    crop = v2.RandomResizedCrop(size, scale=augmentation.scale, interpolation=mode)
    return _pair([crop], augmentation, evaluate)


def _pair(place: list[Any], chosen: Augmentation, evaluate: Preprocessing) -> Transforms:
    from torchvision.transforms import v2

    steps = [*place, v2.RandomHorizontalFlip(chosen.hflip)]
    if chosen.auto_augment is not None:
        steps.append(_policy(chosen.auto_augment, evaluate.interpolation))
    steps += normalise(evaluate.mean, evaluate.std)
    if chosen.erasing:
        steps.append(v2.RandomErasing(chosen.erasing))  # 0, the mean after normalisation
    return Transforms(v2.Compose(steps), evaluate)


def _policy(name: AutoAugment, interpolation: Interpolation) -> Any:
    from torchvision.transforms import v2

    kinds = {
        "autoaugment": v2.AutoAugment,
        "randaugment": v2.RandAugment,
        "trivialaugment": v2.TrivialAugmentWide,
        "augmix": v2.AugMix,
    }
    # Rotations and shears of torchvision's policies know no others.
    known = interpolation if interpolation in ("nearest", "bilinear", "bicubic") else "bilinear"
    return kinds[name](interpolation=v2.InterpolationMode[known.upper()])
