"""The number of samples of every class in a long-tailed training set, and their choice."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .. import checks

PROFILES = ("exponential", "step")


def long_tailed_counts(
    n_max: int, classes: int, imbalance: float, profile: str = "exponential"
) -> list[int]:
    """Samples of every class [C], from n_max for class 0 down to int(n_max / imbalance).

    exponential: n_i = int(n_max f^(i / (C-1))) with f = 1 / imbalance (Cui et al., arXiv
    1901.05555, section 5.1; rounded down as in the code of Cao et al., arXiv 1906.07413).
    step: n_max for the first half of the classes, int(n_max f) for the others (Cao et al., section
    4); with an odd number of classes, the middle one is among the others.

    Raises:
        ValueError: fewer than two classes, imbalance below 1 or above n_max, an unknown profile.
    """
    if classes < 2:
        raise ValueError(f"classes: expected at least 2, got {classes}")
    checks.at_least("imbalance", imbalance, 1.0)
    if imbalance > n_max:
        raise ValueError(
            f"imbalance: expected at most {n_max}, since the largest class keeps {n_max} samples "
            f"and the smallest needs one, got {imbalance}"
        )
    if profile == "exponential":
        shares = [imbalance ** (-i / (classes - 1)) for i in range(classes)]
    elif profile == "step":
        shares = [1.0 if i < classes // 2 else 1 / imbalance for i in range(classes)]
    else:
        raise ValueError(f"profile: expected one of {', '.join(PROFILES)}, got {profile!r}")
    # The small term keeps a whole number from being rounded down: 98 * 49**-1 is 2, not 1.999. It
    # changes no count at the imbalances of published results (10, 20, 50, 100, 200, 500).
    return [math.floor(n_max * share + 1e-9) for share in shares]


def members(targets: Tensor) -> list[Tensor]:
    """For every class [C], the ascending indices of its samples in targets [N] int64."""
    counts = torch.bincount(targets)
    return list(torch.argsort(targets, stable=True).split(counts.tolist()))


def long_tailed_subset(
    targets: Tensor, imbalance: float, *, profile: str = "exponential", seed: int = 0
) -> Tensor:
    """Indices [n] int64 of a long-tailed choice from targets [N] int64, class by class.

    It chooses as the code of Cao et al. (arXiv 1906.07413) does, so that CIFAR with seed 0 gives
    their images in their order: one NumPy RandomState(seed) shuffles the indices of every class,
    classes ascending, and class i keeps its first n_i (`long_tailed_counts`). n_max is the size of
    the smallest class in `targets`.
    """
    per_class = members(targets)
    n_max = min(len(indices) for indices in per_class)
    counts = long_tailed_counts(n_max, len(per_class), imbalance, profile)
    random = np.random.RandomState(seed)
    chosen = []
    for indices, n in zip(per_class, counts, strict=True):
        shuffled = indices.numpy().copy()
        random.shuffle(shuffled)
        chosen.append(torch.from_numpy(shuffled[:n]))
    return torch.cat(chosen)


def hold_out(targets: Tensor, validation_fraction: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """(kept, held out): ascending indices into targets [N] int64 that split every class.

    Of the n samples of a class, round(validation_fraction n) are held out, but at least one and
    never all, so that few-shot classes are in both parts. The sample of a class of one is kept.

    Raises:
        ValueError: validation_fraction outside (0, 1).
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(
            "validation_fraction: expected a number of at least 0 and below 1, got "
            f"{validation_fraction}"
        )
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(targets), dtype=torch.bool)
    for indices in members(targets):
        n = max(round(validation_fraction * len(indices)), 1)
        n = min(n, len(indices) - 1)
        held_out[indices[torch.randperm(len(indices), generator=generator)[:n]]] = True
    return (~held_out).nonzero().squeeze(1), held_out.nonzero().squeeze(1)


def choose(
    targets: Tensor,
    *,
    imbalance: float | None,
    profile: str,
    validation_fraction: float,
    seed: int,
) -> tuple[Tensor, Tensor | None]:
    """Indices (train, validation) into targets [N] int64.

    Validation is held out first, class by class, and training is made long-tailed from the rest;
    with imbalance None it is all of the rest. With validation_fraction 0, validation is None.
    """
    kept, held_out = torch.arange(len(targets)), None
    if validation_fraction:
        kept, held_out = hold_out(targets, validation_fraction, seed=seed)
        if not len(held_out):
            raise ValueError(
                "validation_fraction: expected 0 where no class has two samples, got "
                f"{validation_fraction}"
            )
    if imbalance is not None:
        kept = kept[long_tailed_subset(targets[kept], imbalance, profile=profile, seed=seed)]
    return kept, held_out
