"""Samplers: the samples of an epoch, their order, and each rank's share of them.

The order of an epoch depends on seed and epoch only. Rank r of R takes positions r, r + R, r + 2R
and so on, so the ranks together read the order from front to back, whatever R is. An interrupted
epoch can therefore be resumed, even with another number of ranks, if every rank skips the batches
that were used (`data.ImageLoader.set_epoch`).

Shapes: N samples, C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor, distributed
from torch.utils.data import Sampler

from . import checks

__all__ = [
    "ClassSampler",
    "EpochSampler",
    "EvaluationSampler",
    "InstanceSampler",
    "ProgressiveSampler",
    "class_probabilities",
]


def class_probabilities(class_counts: Tensor, q: float) -> Tensor:
    """p_c = n_c^q / sum_k n_k^q, [C] float64 (Kang et al., arXiv 1910.09217, eq. 1), from
    class_counts [C]; 0 for a class without samples. q = 1 draws all samples equally often, q = 0
    all classes equally often, and q = 1/2 is square-root sampling."""
    power = class_counts.double() ** q * (class_counts > 0)
    return power / power.sum()


def _classes(targets: Sequence[int] | Tensor) -> Tensor:
    classes = torch.as_tensor(targets, device="cpu")
    if classes.dim() != 1 or classes.numel() == 0 or classes.is_floating_point():
        raise ValueError(f"targets: expected integers [N], N >= 1, got {checks.describe(targets)}")
    if int(classes.min()) < 0:
        raise ValueError(f"targets: expected classes of at least 0, got {int(classes.min())}")
    return classes.long()


def _share(num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    """(R, r). None takes the value of the default process group, or 1 and 0 if there is none."""
    grouped = distributed.is_available() and distributed.is_initialized()
    if num_replicas is None:
        num_replicas = distributed.get_world_size() if grouped else 1
    if rank is None:
        rank = distributed.get_rank() if grouped else 0
    checks.integer("num_replicas", num_replicas, 1)
    checks.integer("rank", rank, 0, num_replicas - 1)
    return num_replicas, rank


class EpochSampler(Sampler[int], ABC):
    """A sampler for training: every rank takes a share of the epoch's `order`, all equally long.

    If R does not divide N, the order wraps round to its first samples.

    Args:
        targets: [N] integers, the class of every sample of the data set.
        num_replicas, rank: R and r; None: those of the default process group, or 1 and 0.
        seed: of the order; must be the same on all ranks.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """

    def __init__(
        self,
        targets: Sequence[int] | Tensor,
        *,
        num_replicas: int | None = None,
        rank: int | None = None,
        seed: int = 0,
    ) -> None:
        self.targets = _classes(targets)
        self.num_replicas, self.rank = _share(num_replicas, rank)
        checks.integer("seed", seed, 0)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, counted from 0, of the next iteration."""
        checks.integer("epoch", epoch, 0)
        self.epoch = epoch

    def __len__(self) -> int:
        """Samples of this rank in an epoch: N / R, rounded up."""
        return -(-len(self.targets) // self.num_replicas)

    def __iter__(self) -> Iterator[int]:
        seed = numpy.random.SeedSequence([self.seed, self.epoch]).generate_state(1, numpy.uint64)
        order = self.order(torch.Generator().manual_seed(int(seed[0])))
        own = self.rank + self.num_replicas * torch.arange(len(self), device="cpu")
        return iter(order[own % len(order)].tolist())

    @abstractmethod
    def order(self, generator: torch.Generator) -> Tensor:
        """Indices [N] int64 of the samples of epoch `self.epoch`, for all ranks together."""


class InstanceSampler(EpochSampler):
    """Every sample once an epoch, in random order."""

    def order(self, generator: torch.Generator) -> Tensor:
        return torch.randperm(len(self.targets), generator=generator, device="cpu")


class _ClassDrawer(EpochSampler):
    """Draws N samples with replacement: first a class by `probabilities`, then one of its samples
    uniformly."""

    def __init__(self, targets: Sequence[int] | Tensor, **share: Any) -> None:
        super().__init__(targets, **share)
        self.class_counts = torch.bincount(self.targets)
        self._by_class = self.targets.argsort(stable=True)
        self._first = self.class_counts.cumsum(0) - self.class_counts

    @abstractmethod
    def probabilities(self) -> Tensor:
        """p [C] of the classes in epoch `self.epoch`, float64."""

    def order(self, generator: torch.Generator) -> Tensor:
        N = len(self.targets)
        classes = torch.multinomial(self.probabilities(), N, replacement=True, generator=generator)
        at = torch.rand(N, generator=generator, dtype=torch.float64, device="cpu")
        at = at * self.class_counts[classes]
        return self._by_class[self._first[classes] + at.long()]


class ClassSampler(_ClassDrawer):
    """Draws N samples per epoch with replacement: first a class with probability
    n_c^q / sum_k n_k^q, then one of its samples uniformly (Kang et al., arXiv 1910.09217, eq. 1).
    q = 0 is class-balanced, q = 1/2 square-root sampling. share: `num_replicas`, `rank` and `seed`
    of `EpochSampler`."""

    def __init__(self, targets: Sequence[int] | Tensor, q: float = 0.0, **share: Any) -> None:
        super().__init__(targets, **share)
        checks.at_least("q", q, 0.0, 1.0)
        self.q = float(q)

    def probabilities(self) -> Tensor:
        return class_probabilities(self.class_counts, self.q)


class ProgressiveSampler(_ClassDrawer):
    """Draws like `ClassSampler`, with class probabilities that change from instance-balanced at
    epoch 0 to class-balanced from epoch `epochs` on: p(t) = (1 - t/T) p_instance + t/T p_class at
    epoch t of T = `epochs` (Kang et al., arXiv 1910.09217, eq. 2)."""

    def __init__(self, targets: Sequence[int] | Tensor, epochs: int, **share: Any) -> None:
        super().__init__(targets, **share)
        checks.integer("epochs", epochs, 1)
        self.epochs = epochs

    def probabilities(self) -> Tensor:
        done = min(self.epoch / self.epochs, 1.0)
        instance, balanced = (class_probabilities(self.class_counts, q) for q in (1.0, 0.0))
        return (1 - done) * instance + done * balanced


class EvaluationSampler(Sampler[int]):
    """Gives every sample of a data set of `length` to exactly one rank, in order; the shares differ
    by one sample at most. num_replicas, rank: as for `EpochSampler`."""

    def __init__(
        self, length: int, *, num_replicas: int | None = None, rank: int | None = None
    ) -> None:
        checks.integer("length", length, 0)
        num_replicas, rank = _share(num_replicas, rank)
        self._indices = range(rank, length, num_replicas)

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)
