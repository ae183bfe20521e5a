"""Thresholds whose drop in accuracy is certified: one half of the samples has chosen a path of
thresholds from cautious to risky, the other half tests it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import guarantee
from .exit_table import ExitTable
from .wanted import Wanted, few_samples, problem_of

#: Candidates of a path: so many steps from exits off to the chosen thresholds.
_STEPS = 25


def check_enough(wanted: Wanted, target: Tensor) -> None:
    """Fails if there are too few samples to certify the drop even if no sample is harmed."""
    promise = wanted.promise
    assert promise.guarantee is not None and promise.limit is not None
    for name, drop, n, what in (
        ("max_drop", promise.limit, len(target), ""),
        ("few_drop", promise.few_drop, int(few_samples(target, wanted).sum()), " of the group few"),
    ):
        if drop is None:
            continue
        needed = guarantee.samples_needed(drop, 1 - promise.guarantee)
        if n < needed:
            if drop == 0:
                raise ValueError(f"{name}: expected a drop above 0 with guarantee, got {drop:g}")
            raise ValueError(
                f"guarantee: expected at least {needed} samples{what} in the half that tests, to "
                f"certify {name} {drop:g} with probability {promise.guarantee:g}, got {n}"
            )


def path_to(table: ExitTable, thresholds: Tensor, wanted: Wanted) -> list[Tensor]:
    """Thresholds from exits off to those given: in equal steps of the share that would leave at
    each exit, in each cell, if it were the first."""
    problem, _ = problem_of(table, wanted)
    target = problem.of_tensor(thresholds)
    found = []
    for step in range(1, _STEPS + 1):
        found.append(problem.as_tensor(problem.between(target, step / _STEPS)))
    return found


def certified(path: Sequence[Tensor], table: ExitTable, wanted: Wanted) -> Tensor:
    """The last candidate of the path that the test data certifies, or exits off."""
    promise = wanted.promise
    assert promise.guarantee is not None and promise.limit is not None
    everyone = torch.ones(len(table.target), dtype=torch.bool, device="cpu")
    limits = [guarantee.Limit(promise.limit, _outcomes(path, table, everyone))]
    if promise.few_drop is not None:
        few = few_samples(table.target, wanted)
        limits.append(guarantee.Limit(promise.few_drop, _outcomes(path, table, few)))
    passed = guarantee.certified(limits, promise.guarantee)
    return path[passed - 1] if passed else torch.full_like(path[0], table.criterion.off)


def _outcomes(path: Sequence[Tensor], table: ExitTable, among: Tensor) -> guarantee.Outcome:
    right = torch.stack([
        table.correct.gather(0, table.exit_index(t)[None])[0] for t in path
    ])[:, among]  # fmt: skip
    last = table.correct[-1][among]
    harms, gains = (last & ~right).sum(1), (~last & right).sum(1)
    return guarantee.Outcome(harms.numpy(), gains.numpy(), int(among.sum()))
