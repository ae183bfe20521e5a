"""scikit-learn's handwritten digits, made long-tailed; and the augmentation used on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGE_SIZE = 16


class Split(NamedTuple):
    images: Tensor  # [N, 1, 16, 16] float32 in [-1, 1]
    targets: Tensor  # [N] int64
    position: Tensor  # [N] int64, place in scikit-learn's data set


class LongTailed(NamedTuple):
    train: Split  # class c has class_counts[c] samples, from head (class 0) to tail
    validation: Split  # balanced
    test: Split  # balanced
    class_counts: list[int]  # [C] training samples of every class


def long_tailed_counts(n_max: int, classes: int, imbalance: float) -> list[int]:
    """Samples of every class, n_i = int(n_max * (1/imbalance)^(i / (C-1))) (Cui et al.,
    arXiv 1901.05555, section 5.1), at least 1."""
    if classes < 2:
        raise ValueError(f"classes: expected at least 2, got {classes}")
    if imbalance < 1:
        raise ValueError(f"imbalance: expected at least 1, got {imbalance}")
    # The small term keeps int() from rounding a whole number down: 100 * 50**-1 is 2, not 1.999.
    return [
        max(1, math.floor(n_max * imbalance ** (-i / (classes - 1)) + 1e-9)) for i in range(classes)
    ]


def long_tailed_indices(
    targets: Sequence[int] | Tensor,
    *,
    imbalance: float,
    validation_per_class: int,
    test_per_class: int,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Disjoint indices (train, validation, test) into `targets` [N], each int64.

    Test and validation are held out first and are balanced; training takes its long-tailed share of
    what is left, class 0 being the head. The same seed gives the same split on every machine.
    """
    targets = torch.as_tensor(targets)
    generator = torch.Generator().manual_seed(seed)
    per_class = []
    for c in range(int(targets.max()) + 1):
        members = (targets == c).nonzero().squeeze(1)
        per_class.append(members[torch.randperm(len(members), generator=generator)])
    held_out = test_per_class + validation_per_class
    n_max = min(len(members) for members in per_class) - held_out
    if n_max < imbalance:
        raise ValueError(
            f"imbalance: expected at most {n_max}, the training samples that the smallest class "
            f"has left, got {imbalance}"
        )
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
) -> LongTailed:
    """The 1797 digits of 8x8 pixels as a long-tailed training set with balanced validation and
    test parts, enlarged to 16x16."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy(digits.images).float()[:, None] / 8.0 - 1.0
    images = F.interpolate(pixels, size=IMAGE_SIZE, mode="bilinear", align_corners=False)
    targets = torch.from_numpy(digits.target).long()
    train, validation, test = (
        Split(images[index], targets[index], index)
        for index in long_tailed_indices(
            targets,
            imbalance=imbalance,
            validation_per_class=validation_per_class,
            test_per_class=test_per_class,
            seed=seed,
        )
    )
    return LongTailed(train, validation, test, torch.bincount(train.targets).tolist())


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [N, 1, H, W], each turned, scaled and shifted a little at random."""
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
