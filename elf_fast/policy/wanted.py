"""What a policy is to be chosen for: the arguments of `choose`, checked.

Shapes: E exits, N samples, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import checks
from . import shares
from .artefact import Promise
from .cells import cells_of
from .exit_table import ExitTable
from .search import Goal, Problem

Per = Literal["exit", "class", "group"]


class Wanted(NamedTuple):
    """The arguments of `choose`, checked."""

    promise: Promise
    shares: list[float] | None
    costs: list[float]  # [E] in units of the limit
    per: Per
    groups: Mapping[str, Sequence[int]]
    classes: int  # C


def checked(
    table: ExitTable,
    flops: Sequence[float],
    max_flops: float | None,
    max_ms: float | None,
    max_drop: float | None,
    exit_shares: Sequence[float] | None,
    few_drop: float | None,
    guarantee: float | None,
    per: Per,
    groups: Mapping[str, Sequence[int]] | None,
    ms: Sequence[float] | None,
    batch: int | None,
    device: str | None,
) -> Wanted:
    E = len(table.statistic)
    if E < 2:
        raise ValueError("table: expected a network with early exits, got one without")
    if not len(table.target):
        raise ValueError("table: expected at least one sample, got none")
    aims = {"max_flops": max_flops, "max_ms": max_ms, "max_drop": max_drop,
            "exit_shares": exit_shares}  # fmt: skip
    given = [name for name, value in aims.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{given[1]}: expected one limit alone, got {given[0]}, too")
    costs = _costs("flops", flops, E)
    if max_flops is not None:
        checks.at_least("max_flops", max_flops, 0.0)
        _check_reachable("max_flops", max_flops, table, costs)
    elif max_ms is not None:
        if ms is None:
            raise ValueError(f"max_ms: expected the argument ms beside it, got none and {max_ms}")
        costs = _costs("ms", ms, E)
        checks.at_least("max_ms", max_ms, 0.0)
        _check_reachable("max_ms", max_ms, table, costs)
    for name, value in (("max_drop", max_drop), ("few_drop", few_drop)):
        if value is not None:
            checks.at_least(name, value, 0.0, 1.0)
    if guarantee is not None and not 0 < checks.number("guarantee", guarantee) < 1:
        raise ValueError(f"guarantee: expected a probability in (0, 1), got {guarantee}")
    for name, value in (("guarantee", guarantee), ("few_drop", few_drop)):
        if value is not None and max_drop is None:
            raise ValueError(f"{name}: expected max_drop, too, got none")
    if per not in ("exit", "class", "group"):
        raise ValueError(f"per: expected exit, class or group, got {per!r}")
    if groups is None and per == "group":
        raise ValueError("groups: expected classes by group with per='group', got none")
    if few_drop is not None and not (groups or {}).get("few"):
        raise ValueError("groups: expected classes in the group 'few' with few_drop, got none")
    aim = given[0] if given else "accuracy"
    limit = aims[aim] if aim in ("max_flops", "max_ms", "max_drop") else None
    assert limit is None or isinstance(limit, (int, float))
    promise = Promise(
        aim, None if limit is None else float(limit), few_drop, guarantee,
        *((batch, device) if aim == "max_ms" else (None, None)),
    )  # fmt: skip
    wanted = None if exit_shares is None else shares.shares(exit_shares, E)
    if wanted is not None and per != "exit":
        raise ValueError(f"per: expected 'exit' with exit_shares, got {per!r}")
    return Wanted(promise, wanted, costs, per, groups or {}, _classes(table, groups or {}))


def _classes(table: ExitTable, groups: Mapping[str, Sequence[int]]) -> int:
    """C, or as many classes as occur, if the table holds no logits."""
    if table.logits is not None:
        return table.logits.shape[2]
    named = [c for classes in groups.values() for c in classes]
    return 1 + max(int(table.prediction.max()), int(table.target.max()), *named, 0)


def _costs(name: str, value: Any, exits: int) -> list[float]:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != exits:
        raise ValueError(f"{name}: expected {exits} numbers, one per exit, got {value!r}")
    for number in value:
        checks.at_least(name, number, 0.0)
    return [float(number) for number in value]


def _check_reachable(name: str, limit: float, table: ExitTable, costs: Sequence[float]) -> None:
    """Fails if even leaving at the cheapest exit costs more than the limit."""
    everyone = torch.full((len(costs) - 1,), table.criterion.everyone, device="cpu")
    if not math.isfinite(table.criterion.everyone):
        known = ~table.statistic[:-1].isnan()
        index = torch.cat([known, known[:1] | True]).int().argmax(0)
    else:
        index = table.exit_index(everyone)
    least = float(np.asarray(costs)[index.numpy()].mean())
    if limit < least - 1e-9:
        unit = "ms" if name == "max_ms" else ""
        shown = math.ceil(least * 1000 - 1e-6) / 1000
        raise ValueError(
            f"{name}: expected at least {shown:g}{unit and ' ' + unit} (all leave at the first "
            f"exit), got {limit:g}"
        )


def problem_of(table: ExitTable, wanted: Wanted) -> tuple[Problem, Goal]:
    promise = wanted.promise
    few = few_samples(table.target, wanted)
    cells = cells_of(table, wanted.per, wanted.groups, wanted.classes)
    problem = Problem(table, wanted.costs, cells=cells, few=few)
    if promise.aim in ("max_flops", "max_ms"):
        assert promise.limit is not None
        return problem, Goal(most=promise.limit)
    if promise.aim == "max_drop":
        assert promise.limit is not None
        off = problem.value(problem.never())
        least = None if promise.few_drop is None else off.few - promise.few_drop
        return problem, Goal(least=off.accuracy - promise.limit, few_least=least)
    return problem, Goal()


def few_samples(target: Tensor, wanted: Wanted) -> Tensor:
    return torch.isin(
        target, torch.as_tensor(list(wanted.groups.get("few", [])), dtype=torch.int64)
    )
