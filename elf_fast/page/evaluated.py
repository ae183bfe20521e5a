"""One evaluation, and the estimates that its page shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..flops import Flops
from ..policy import Estimate
from ..policy.one_number import moved_to
from ..runs.observation import Observed
from . import estimates
from .speed import Speed

#: How many of the images that left early and wrong are kept and shown.
SHOWN = 24
TIMED = 6  # settings of thresholds


class Setting(NamedTuple):
    """Thresholds, and what they give."""

    thresholds: Tensor  # [E-1] or [E-1, C]
    accuracy: float
    flops: float  # per sample


@dataclass(frozen=True)
class Evaluated:
    """One evaluation. Shapes: C classes, E exits, N samples."""

    name: str  # as the user calls it
    part: str  # of the data, "test" or "validation"
    class_names: list[str]
    class_counts: list[int]  # [C] training images
    flops: Flops
    thresholds: Tensor  # [E-1] or [E-1, C]
    observed: Observed
    mean: tuple[float, ...]  # of the preprocessing, to show images
    std: tuple[float, ...]
    files: Sequence[str] | None  # [N] names of the images, if they are files
    prior: Tensor | None  # [C] weights of the classes; None: every sample counts 1
    speed: Speed | None

    def check(self) -> None:
        """Raises ValueError unless there are samples that count; the estimates need some."""
        if not bool(self.weight.sum() > 0):
            raise ValueError(f"{self.name}: expected at least one image that counts, got none")

    @property
    def exits(self) -> int:
        return len(self.flops.stages)

    @cached_property
    def target(self) -> Tensor:
        return self.observed.table.target

    @cached_property
    def weight(self) -> Tensor:
        """[N] float64."""
        if self.prior is None:
            return torch.ones(len(self.target), dtype=torch.float64)
        of_class = torch.bincount(self.target, minlength=len(self.prior)).clamp(1)
        return (self.prior.double() / of_class)[self.target]

    @cached_property
    def costs(self) -> Tensor:
        """[E] FLOPs of a sample that leaves at each exit."""
        return torch.tensor([self.flops.leaving_at(e) for e in range(self.exits)]).double()

    @cached_property
    def correct(self) -> Tensor:
        """[N] bool, at the exit that was taken."""
        return self.observed.table.correct.gather(0, self.observed.exit_index[None])[0]

    @cached_property
    def correct_at_end(self) -> Tensor:
        """[N] bool, at the last exit."""
        return self.observed.table.correct[-1]

    @cached_property
    def accuracy(self) -> Estimate:
        return _known(estimates.share(self.correct, self.weight))

    @cached_property
    def accuracy_at_end(self) -> Estimate:
        """If all samples went through the whole network."""
        return _known(estimates.share(self.correct_at_end, self.weight))

    @cached_property
    def gain(self) -> Estimate:
        """Accuracy less that of the last exit for all samples, by paired samples."""
        gained = self.correct.double() - self.correct_at_end.double()
        return _known(estimates.mean(gained, self.weight))

    @cached_property
    def flops_per_sample(self) -> Estimate:
        return _known(estimates.mean(self.costs[self.observed.exit_index], self.weight))

    @property
    def flops_share(self) -> Estimate:
        return Estimate(*(value / self.flops.without_exits for value in self.flops_per_sample))

    @cached_property
    def sweep(self) -> list[Setting]:
        """While one number moves all thresholds, from the least cautious."""
        if self.exits == 1:
            return []
        table, total = self.observed.table, self.weight.sum()
        found = []
        for value in table.criterion.candidates(table.statistic[:-1]):
            moved = moved_to(value, self.thresholds, table.criterion)
            taken = table.exit_index(moved)
            right = table.correct.gather(0, taken[None])[0]
            flops = (self.weight * self.costs[taken]).sum() / total
            accuracy = (self.weight * right).sum() / total
            found.append(Setting(moved, float(accuracy), float(flops)))
        return found

    @cached_property
    def timed(self) -> list[Setting]:
        """The settings of the sweep that are timed: evenly spread over FLOPs."""
        if not self.sweep:
            return []
        by_flops = sorted(self.sweep, key=lambda setting: setting.flops)
        low, high = by_flops[0].flops, by_flops[-1].flops
        nearest = []
        for i in range(TIMED):
            wanted = low + (high - low) * i / (TIMED - 1)
            distances = [abs(setting.flops - wanted) for setting in by_flops]
            nearest.append(by_flops[distances.index(min(distances))])
        return list({id(setting): setting for setting in nearest}.values())

    def counts(self) -> Tensor:
        """[E, C, 2] samples by exit, class, and wrong or right; unweighted."""
        E, C = self.exits, len(self.class_names)
        cell = (self.observed.exit_index * C + self.target) * 2 + self.correct
        return torch.bincount(cell, minlength=2 * E * C).view(E, C, 2)


def _known(estimate: Estimate | None) -> Estimate:
    assert estimate is not None  # see `check`
    return estimate
