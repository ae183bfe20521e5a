"""The usual augmentation for small and for large images, from torchvision.transforms.v2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image

from .images import Transform

#: Means and standard deviations per channel, of pixels in [0, 1]. CIFAR_STD is the one of long-tail
#: papers on CIFAR-10 and CIFAR-100 (as in the code of Cao et al., arXiv 1906.07413): the mean over
#: images of the deviation inside an image, which is smaller than the deviation of all pixels.
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: The longest shape, as a ratio of sides, that is scaled as a whole for evaluation. The centre crop
#: sees 7/8 of the shorter side.
LONGEST = 4


class Transforms(NamedTuple):
    """From an RGB image (PIL) to a float32 tensor [3, size, size]."""

    train: Transform
    evaluate: Transform


def small_image_transforms(
    size: int = 32, *, mean: Sequence[float] = CIFAR_MEAN, std: Sequence[float] = CIFAR_STD
) -> Transforms:
    """For images of size x size pixels. In training they are shifted by up to size / 8 pixels, with
    zeros outside the image, and mirrored, both at random (He et al., arXiv 1512.03385, section
    4.2). An image of another size raises a ValueError."""
    from torchvision.transforms import v2

    augment = [v2.RandomCrop(size, padding=size // 8), v2.RandomHorizontalFlip()]
    return _pair([_Exactly(size), *augment], [_Exactly(size)], mean, std)


class _Exactly:
    """Returns an image of size x size pixels as it is; raises ValueError for another size."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        if image.size != (self.size, self.size):
            raise ValueError(
                f"expected an image of {self.size}x{self.size} pixels, got "
                f"{image.width}x{image.height}; image_transforms (--transforms large) takes images "
                "of any size"
            )
        return image


def image_transforms(
    size: int = 224, *, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Transforms:
    """For images of any size. Training crops a random part of 8% to 100% of the area, scales it to
    size x size pixels and mirrors it at random. Evaluation scales the shorter side to 8/7 of size
    and crops the centre; of images more than `LONGEST` times as long as wide it scales the middle
    only."""
    from torchvision.transforms import v2

    augment = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
    evaluate = [_middle, v2.Resize(round(size * 8 / 7)), v2.CenterCrop(size)]
    return _pair(augment, evaluate, mean, std)


def _middle(image: Image.Image) -> Image.Image:
    """The middle of an image that is more than `LONGEST` times as long as wide, and other images as
    they are. An image of 2 x 20,000 pixels, scaled as a whole, would need gigabytes."""
    short, long = sorted(image.size)
    rest = (long - LONGEST * short) // 2  # pixels cut at each end; the centre stays
    if rest <= 0:
        return image
    width, height = image.size
    x, y = (rest, 0) if width == long else (0, rest)
    return image.crop((x, y, width - x, height - y))


def _pair(
    train: list[Any], evaluate: list[Any], mean: Sequence[float], std: Sequence[float]
) -> Transforms:
    from torchvision.transforms import v2

    normalise = [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean, std),
    ]
    return Transforms(v2.Compose([*train, *normalise]), v2.Compose([*evaluate, *normalise]))
