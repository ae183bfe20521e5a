"""scikit-learn's handwritten digits, made long-tailed; and the augmentation used on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from .longtail import long_tailed_counts, members
from .splits import Splits

IMAGE_SIZE = 16
DIGITS = 10


class Digits(Dataset[tuple[Tensor, int]]):
    """Images in memory. The attributes hold all of them, for use without a loader."""

    def __init__(self, images: Tensor, targets: Tensor, position: Tensor) -> None:
        self.images = images  # [N, 1, 16, 16] float32 in [-1, 1]
        self.targets = targets  # [N] int64
        self.position = position  # [N] int64, index into scikit-learn's data set

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.targets[index])

    def keys(self) -> list[bytes]:
        """[N] the numbers of the digits in scikit-learn's data set."""
        return [str(position).encode() for position in self.position.tolist()]


@dataclass(frozen=True)
class DigitSplits(Splits):
    train: Digits  # class c has class_counts[c] samples, from head (class 0) to tail
    validation: Digits  # balanced
    test: Digits  # balanced


def long_tailed_indices(
    targets: Tensor,
    *,
    imbalance: float,
    validation_per_class: int,
    test_per_class: int,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Disjoint indices (train, validation, test) into `targets` [N] int64, each int64.

    Test and validation are held out first and are balanced; training is a long-tailed choice from
    the rest, with class 0 as the head. The same seed gives the same split on every machine.
    """
    generator = torch.Generator().manual_seed(seed)
    per_class = [
        indices[torch.randperm(len(indices), generator=generator)] for indices in members(targets)
    ]
    held_out = test_per_class + validation_per_class
    n_max = min(len(indices) for indices in per_class) - held_out
    counts = long_tailed_counts(n_max, len(per_class), imbalance)
    test = torch.cat([m[:test_per_class] for m in per_class])
    validation = torch.cat([m[test_per_class:held_out] for m in per_class])
    train = torch.cat([m[held_out : held_out + n] for m, n in zip(per_class, counts, strict=True)])
    return train, validation, test


def long_tailed_digits(
    imbalance: float = 50.0,
    *,
    validation_per_class: int = 20,
    test_per_class: int = 50,
    seed: int = 0,
    class_order: Sequence[int] = range(DIGITS),
) -> DigitSplits:
    """The 1797 digits of 8x8 pixels as a long-tailed training set with balanced validation and
    test parts, enlarged to 16x16.

    Args:
        class_order: the digit of every class, from head to tail.

    Raises:
        ValueError: imbalance is out of range, or class_order does not hold every digit once.
    """
    from sklearn.datasets import load_digits

    if sorted(class_order) != list(range(DIGITS)):
        raise ValueError(
            f"class_order: expected every digit from 0 to {DIGITS - 1} once, "
            f"got {list(class_order)}"
        )
    digits = load_digits()
    pixels = torch.from_numpy(digits.images).float()[:, None] / 8.0 - 1.0
    images = F.interpolate(pixels, size=IMAGE_SIZE, mode="bilinear", align_corners=False)
    class_of_digit = torch.tensor(class_order).argsort()
    targets = class_of_digit[torch.from_numpy(digits.target).long()]
    train, validation, test = (
        Digits(images[index], targets[index], index)
        for index in long_tailed_indices(
            targets,
            imbalance=imbalance,
            validation_per_class=validation_per_class,
            test_per_class=test_per_class,
            seed=seed,
        )
    )
    return DigitSplits(train, validation, test, class_names=[str(digit) for digit in class_order])


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [N, 1, H, W], each at random rotated (by up to 0.25 rad), scaled (by up to 15%) and
    shifted (by up to 7.5% of its size)."""
    N = images.shape[0]

    def uniform(limit: float, *shape: int) -> Tensor:
        return (2 * torch.rand(shape, generator=generator) - 1) * limit

    angle, scale, shift = uniform(0.25, N), 1 + uniform(0.15, N), uniform(0.15, N, 2)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack(
        [torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
