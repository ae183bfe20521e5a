"""`calibrate` and `choose`: a policy for a network, or for anyone's table of exits.

Shapes: E exits, N samples, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import checks, criteria, digests
from ..base import ELFBase
from ..criteria import Score
from ..flops import count_flops
from ..groups import class_groups
from . import guarantee as testing
from . import shares, temperatures
from .artefact import Policy, Promise, Tried, nested
from .cells import cells_of
from .costs import flops_shares, milliseconds
from .exit_table import ExitTable, exit_table
from .measure import measured
from .one_number import candidates_of
from .search import Goal, Problem, search

Per = Literal["exit", "class", "group"]
_OPTIONS = {
    "max_flops", "max_drop", "exit_shares", "few_drop", "guarantee", "per", "criterion",
    "data_digest",
}  # fmt: skip
#: The split into the half that chooses and the half that tests is the same every time.
_SEED = 0
#: The candidates that a guarantee tests: so many steps from exits off to the chosen thresholds.
_STEPS = 25


class _Wanted(NamedTuple):
    """The arguments of `choose`, checked."""

    promise: Promise
    shares: list[float] | None
    costs: list[float]  # [E] in units of the limit
    per: Per
    groups: Mapping[str, Sequence[int]]


def choose(
    table: ExitTable,
    flops: Sequence[float],
    *,
    max_flops: float | None = None,
    max_ms: float | None = None,
    max_drop: float | None = None,
    exit_shares: Sequence[float] | None = None,
    few_drop: float | None = None,
    guarantee: float | None = None,
    per: Per = "exit",
    groups: Mapping[str, Sequence[int]] | None = None,
    criterion: str | Score | Sequence[str | Score] | None = None,
    ms: Sequence[float] | None = None,
    batch: int | None = None,
    device: str | None = None,
    data_digest: str | None = None,
) -> Policy:
    """The best thresholds on a table: for all exits jointly, with the exact effect of earlier exits.

    At most one of max_flops, max_ms, max_drop and exit_shares is given; with none the most accurate
    thresholds are chosen, and of equally accurate ones the cheapest. The same arguments always give
    the same policy.

    Args:
        table: if it holds logits, temperatures are fitted by maximum likelihood, and criteria can be
            compared; otherwise its statistic is taken as it is.
        flops: [E] FLOPs of a sample that leaves at each exit, as shares of the network without
            exits.
        max_flops: the largest mean share of FLOPs; the most accurate thresholds within it.
        max_ms: the same for milliseconds per batch, in units of `ms`.
        max_drop: the largest drop in accuracy (0.01 is one point) against exits off; the cheapest
            thresholds within it.
        exit_shares: [E] shares of the samples that leave at each exit.
        few_drop: beside max_drop, the largest drop on samples of the group "few".
        guarantee: the probability, such as 0.95, with which max_drop (and few_drop) hold on new data
            of the same kind. Half of the samples choose, the other half test: `policy.guarantee`.
        per: a threshold per exit, or per exit one for each class or each group of classes.
        groups: classes by the name of their group.
        criterion: a name, a callable, several of these to compare, or "auto": all that kernels
            compute. None: the table's.
        ms: [E] milliseconds of a batch whose samples all leave at each exit: `costs.milliseconds`.
        batch, device: of `ms`, to be written into the policy.
        data_digest: of the calibration data; None: `ExitTable.digest`.

    Raises:
        TypeError, ValueError: an argument that does not fit, or a limit that cannot be reached; the
            message says what can.
    """
    wanted = _checked(
        table, flops, max_flops, max_ms, max_drop, exit_shares, few_drop, guarantee, per, groups, ms,
        batch, device,
    )  # fmt: skip
    tried = _tables(table, criterion)
    if guarantee is None:
        chooses = tests = torch.arange(len(table.target))
    else:
        order = torch.randperm(len(table.target), generator=torch.Generator().manual_seed(_SEED))
        chooses, tests = (part.sort().values for part in order.chunk(2))
        _check_enough(wanted, table.target[tests])
    found = [(*_searched(t.rows(chooses), wanted), t) for t in tried]
    compared = [Tried(_name(t), float(v.accuracy), float(v.cost)) for _, v, _, _, t in found]
    _, _, thresholds, T, chosen = max(found, key=lambda f: f[0])
    tested = _with(chosen.rows(tests), T)
    if guarantee is not None:
        path = _path(_with(chosen.rows(chooses), T), thresholds, wanted)
        thresholds = _certified(path, tested, wanted)
    exit_index = tested.exit_index(thresholds)
    mean_ms = None if ms is None else float(np.asarray(ms)[exit_index.numpy()].mean())
    rule = chosen.criterion
    return Policy(
        criterion=rule.name if rule.score is None else rule.score,
        thresholds=nested(thresholds),
        temperatures=tuple(T),
        promise=wanted.promise,
        measured=measured(tested, thresholds, flops, ms=mean_ms, groups=wanted.groups),
        data_digest=data_digest or table.digest(),
        tried=tuple(compared) if len(compared) > 1 else (),
    )


class Observed(NamedTuple):
    """One pass of a model over calibration data."""

    table: ExitTable  # with logits; its statistic is that of the model as it was
    flops: list[float]  # [E] as for `choose`
    images: Tensor  # the first ones, on the model's device


def observe(model: ELFBase, loader: Iterable[tuple[Tensor, Tensor]], images: int = 1) -> Observed:
    """Runs the model over batches of images [n, ...] and targets [n], and keeps some images.

    Raises:
        TypeError, ValueError: no ELF, or no sample.
    """
    if not isinstance(model, ELFBase):
        raise TypeError(f"model: expected an ELF, got {checks.describe(model)}")
    kept: list[Tensor] = []

    def noted() -> Iterable[tuple[Tensor, Tensor]]:
        for x, y in loader:
            if sum(map(len, kept)) < images:
                kept.append(x[:images])
            yield x, y

    table = exit_table(model, noted(), keep_logits=True)
    if not len(table.target):
        raise ValueError("loader: expected at least one sample, got none")
    few = torch.cat(kept)[:images].to(model.thresholds.device)
    return Observed(table, flops_shares(count_flops(model, few[:1])), few)


def calibrate(
    model: ELFBase,
    loader: Iterable[tuple[Tensor, Tensor]] | Observed,
    *,
    max_ms: float | None = None,
    batch: int = 1,
    class_counts: Sequence[int] | None = None,
    groups: Mapping[str, Sequence[int]] | None = None,
    **options: Any,
) -> Policy:
    """A policy for a model from one pass over calibration data, which must not be training data.
    The model stays as it is: `model.apply_policy(policy)` sets what was chosen.

    Args:
        loader: batches of images [n, ...] and targets [n], or what `observe` returned.
        max_ms: the largest mean time of a batch of `batch` images in milliseconds, from the times of
            the stages on the model's device.
        class_counts: [C] training images of every class, for the groups many, medium and few; None:
            those of the model, if `elf_fast.load` opened it.
        groups: other groups, classes by name.
        options: max_flops, max_drop, exit_shares, few_drop, guarantee, per, criterion and
            data_digest of `choose`.

    Raises:
        TypeError, ValueError: as `choose`.
    """
    checks.integer("batch", batch, 1)
    unknown = set(options) - _OPTIONS
    if unknown:
        raise TypeError(f"{min(unknown)}: expected one of {', '.join(sorted(_OPTIONS))}")
    table, flops, images = loader if isinstance(loader, Observed) else observe(model, loader, batch)
    counts = getattr(model, "class_counts", None) if class_counts is None else class_counts
    if groups is None and counts is not None:
        groups = class_groups(counts)
    if max_ms is not None:
        repeats = -(-batch // len(images))
        ms = milliseconds(model, torch.cat([images] * repeats)[:batch])
        options.update(ms=ms, batch=batch, device=str(images.device))
    policy = choose(table, flops, max_ms=max_ms, groups=groups, **options)
    return replace(policy, weights_digest=digests.of_weights(model.state_dict()))


def _checked(
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
) -> _Wanted:
    E = len(table.statistic)
    if E < 2:
        raise ValueError("table: expected early exits, got one of a network without")
    if not len(table.target):
        raise ValueError("table: expected at least one sample, got none")
    aims = {"max_flops": max_flops, "max_ms": max_ms, "max_drop": max_drop,
            "exit_shares": exit_shares}  # fmt: skip
    given = [name for name, value in aims.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{given[1]}: expected none beside {given[0]}, got {aims[given[1]]}")
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
    if guarantee is not None:
        if not 0 < checks.number("guarantee", guarantee) < 1:
            raise ValueError(f"guarantee: expected a probability in (0, 1), got {guarantee}")
    for name, value in (("guarantee", guarantee), ("few_drop", few_drop)):
        if value is not None and max_drop is None:
            raise ValueError(f"{name}: expected max_drop beside it, got none and {value}")
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
    return _Wanted(promise, wanted, costs, per, groups or {})


def _costs(name: str, value: Any, exits: int) -> list[float]:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != exits:
        raise ValueError(f"{name}: expected {exits} numbers, one per exit, got {value!r}")
    for number in value:
        checks.at_least(name, number, 0.0)
    return [float(number) for number in value]


def _check_reachable(name: str, limit: float, table: ExitTable, costs: Sequence[float]) -> None:
    """Fails if even leaving at the cheapest exit costs more than the limit."""
    everyone = torch.full((len(costs) - 1,), table.criterion.everyone)
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


def _tables(table: ExitTable, criterion: Any) -> list[ExitTable]:
    """The table with each criterion that is to be tried."""
    if criterion is None:
        return [table]
    if isinstance(criterion, str) and criterion == "auto":
        criterion = list(criteria.TABLE)
    several = isinstance(criterion, (list, tuple))
    rules = [criteria.find(c) for c in (criterion if several else [criterion])]
    if not rules:
        raise ValueError("criterion: expected at least one, got none")
    if rules == [table.criterion]:
        return [table]
    return [table.changed(criterion=rule) for rule in rules]


def _with(table: ExitTable, T: Sequence[float]) -> ExitTable:
    return table if table.logits is None else table.changed(temperatures=list(T))


def _searched(
    table: ExitTable, wanted: _Wanted
) -> tuple[tuple[float, ...], Any, Tensor, list[float]]:
    """(rank, value, thresholds, temperatures) of the best thresholds on a table."""
    T = [1.0] * (len(table.statistic) - 1) if table.logits is None else temperatures.fit(table)
    table = _with(table, T)
    problem, goal = _problem(table, wanted)
    if wanted.shares is not None:
        thresholds = shares.thresholds_for(table, wanted.shares)
        value = Problem(table, wanted.costs).value(problem.of_tensor(thresholds))
        return (float(value.accuracy),), value, thresholds, T
    starts = [problem.of_tensor(t) for t in (*candidates_of(table), *shares.geometric(table))]
    best = max(starts, key=lambda t: goal.rank(problem.value(t)))
    found = search(problem, goal, [best])
    value = problem.value(found)
    return goal.rank(value), value, problem.as_tensor(found), T


def _problem(table: ExitTable, wanted: _Wanted) -> tuple[Problem, Goal]:
    promise = wanted.promise
    few = _few(table.target, wanted)
    cells = cells_of(table, wanted.per, wanted.groups)
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


def _few(target: Tensor, wanted: _Wanted) -> Tensor:
    return torch.isin(
        target, torch.as_tensor(list(wanted.groups.get("few", [])), dtype=torch.int64)
    )


# Guarantee


def _check_enough(wanted: _Wanted, target: Tensor) -> None:
    """Fails if there are too few samples to certify the drop even if no sample is harmed."""
    promise = wanted.promise
    assert promise.guarantee is not None and promise.limit is not None
    for name, drop, n, what in (
        ("max_drop", promise.limit, len(target), ""),
        ("few_drop", promise.few_drop, int(_few(target, wanted).sum()), " of the group few"),
    ):
        if drop is None:
            continue
        needed = testing.samples_needed(drop, 1 - promise.guarantee)
        if n < needed:
            if drop == 0:
                raise ValueError(f"{name}: expected a drop above 0 with guarantee, got {drop:g}")
            raise ValueError(
                f"guarantee: expected at least {2 * needed} samples{what} to certify {name} "
                f"{drop:g} with probability {promise.guarantee:g}, of which half test, got {2 * n}"
            )


def _path(table: ExitTable, thresholds: Tensor, wanted: _Wanted) -> list[Tensor]:
    """Thresholds from exits off to those given: in equal steps of the share that would leave at each
    exit, in each cell, if it were the first."""
    problem, _ = _problem(table, wanted)
    target = problem.of_tensor(thresholds)
    found = []
    for step in range(1, _STEPS + 1):
        found.append(problem.as_tensor(problem.between(target, step / _STEPS)))
    return found


def _certified(path: Sequence[Tensor], table: ExitTable, wanted: _Wanted) -> Tensor:
    """The last candidate of the path that the test data certifies, or exits off."""
    promise = wanted.promise
    assert promise.guarantee is not None and promise.limit is not None
    everyone = torch.ones(len(table.target), dtype=torch.bool)
    limits = [testing.Limit(promise.limit, _outcomes(path, table, everyone))]
    if promise.few_drop is not None:
        few = _few(table.target, wanted)
        limits.append(testing.Limit(promise.few_drop, _outcomes(path, table, few)))
    passed = testing.certified(limits, promise.guarantee)
    return path[passed - 1] if passed else torch.full_like(path[0], table.criterion.off)


def _outcomes(path: Sequence[Tensor], table: ExitTable, among: Tensor) -> testing.Outcome:
    right = torch.stack([
        table.correct.gather(0, table.exit_index(t)[None])[0] for t in path
    ])[:, among]  # fmt: skip
    last = table.correct[-1][among]
    harms, gains = (last & ~right).sum(1), (~last & right).sum(1)
    return testing.Outcome(harms.numpy(), gains.numpy(), int(among.sum()))


def _name(table: ExitTable) -> str:
    return table.criterion.name
