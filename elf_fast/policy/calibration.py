"""`calibrate` and `choose`: a policy for a network, or for anyone's table of exits.

Shapes: E exits, N samples, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import checks, criteria, digests
from ..base import ELFBase
from ..criteria import Score
from ..flops import count_flops
from ..groups import class_groups
from . import shares, temperatures
from .artefact import Policy, Tried, nested
from .certify import certified, check_enough, path_to
from .costs import flops_shares, milliseconds
from .exit_table import ExitTable, exit_table
from .measure import measured
from .one_number import candidates_of
from .search import Problem, search
from .wanted import Per, Wanted, checked, problem_of

_OPTIONS = {
    "max_flops", "max_drop", "exit_shares", "few_drop", "guarantee", "per", "criterion",
    "data_digest",
}  # fmt: skip
#: The split into the half that chooses and the half that tests is the same every time.
_SEED = 0


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
    """The best thresholds for all exits jointly, with the exact effect of earlier exits.

    At most one of max_flops, max_ms, max_drop and exit_shares is given; with none the most accurate
    thresholds are chosen, and of equally accurate ones the cheapest. The same arguments always give
    the same policy.

    Args:
        table: if it holds logits, temperatures are fitted by maximum likelihood, and criteria can
            be compared; otherwise its statistic is taken as it is, as one of temperature 1.
        flops: [E] FLOPs of a sample that leaves at each exit, as shares of the network without
            exits.
        max_flops: the largest mean share of FLOPs; the most accurate thresholds within it.
        max_ms: the same for milliseconds per batch, in units of `ms`.
        max_drop: the largest drop in accuracy (0.01 is one point) against exits off; the cheapest
            thresholds within it.
        exit_shares: [E] shares of the samples that leave at each exit.
        few_drop: beside max_drop, the largest drop on samples of the group "few".
        guarantee: the probability, such as 0.95, with which max_drop (and few_drop) hold on new
            data of the same kind. Half of the samples choose, the others test: `certify`.
        per: a threshold per exit, or per exit one for each class or each group of classes.
        groups: classes by the name of their group.
        criterion: a name, a callable, several of these to compare, or "auto": all that kernels
            compute. None: the table's.
        ms: [E] milliseconds of a batch whose samples all leave at each exit: `costs.milliseconds`.
        batch, device: of `ms`, to be written into the policy.
        data_digest: of the calibration data; None: `ExitTable.digest`.

    Raises:
        TypeError, ValueError: an argument that does not fit, or a limit that cannot be reached;
            the message says what can.
    """
    wanted = checked(
        table, flops, max_flops, max_ms, max_drop, exit_shares, few_drop, guarantee, per, groups,
        ms, batch, device,
    )  # fmt: skip
    tried = _tables(table, criterion)
    if guarantee is None:
        chooses = tests = torch.arange(len(table.target), device="cpu")
    else:
        generator = torch.Generator("cpu").manual_seed(_SEED)
        order = torch.randperm(len(table.target), generator=generator, device="cpu")
        chooses, tests = (part.sort().values for part in order.chunk(2))
        check_enough(wanted, table.target[tests])
    found = [(*_searched(_rows(t, chooses), wanted), t) for t in tried]
    compared = [
        Tried(t.criterion.name, float(v.accuracy), float(v.cost)) for _, v, _, _, t in found
    ]
    _, _, thresholds, T, chosen = max(found, key=lambda f: f[0])
    tested = _with(_rows(chosen, tests), T)
    if guarantee is not None:
        path = path_to(_with(_rows(chosen, chooses), T), thresholds, wanted)
        thresholds = certified(path, tested, wanted)
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
    checks.integer("images", images, 1)
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
        max_ms: the largest mean time of a batch of `batch` images in milliseconds, from the times
            of the stages on the model's device.
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
    counts = model.class_counts if class_counts is None else class_counts
    if groups is None and len(counts):  # a model that was not loaded has none
        groups = class_groups(counts)
    if max_ms is not None:
        repeats = -(-batch // len(images))
        ms = milliseconds(model, torch.cat([images] * repeats)[:batch])
        options.update(ms=ms, batch=batch, device=str(images.device))
    policy = choose(table, flops, max_ms=max_ms, groups=groups, **options)
    return replace(policy, weights_digest=digests.of_weights(model.state_dict()))


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


def _rows(table: ExitTable, index: Tensor) -> ExitTable:
    """The table of some samples. Of all samples it is not copied: its logits may be in a file."""
    return table if len(index) == len(table.target) else table.rows(index)


def _with(table: ExitTable, T: Sequence[float]) -> ExitTable:
    return table if table.logits is None else table.changed(temperatures=list(T))


def _searched(
    table: ExitTable, wanted: Wanted
) -> tuple[tuple[float, ...], Any, Tensor, list[float]]:
    """(rank, value, thresholds, temperatures) of the best thresholds on a table."""
    T = [1.0] * (len(table.statistic) - 1) if table.logits is None else temperatures.fit(table)
    table = _with(table, T)
    problem, goal = problem_of(table, wanted)
    if wanted.shares is not None:
        thresholds = shares.thresholds_for(table, wanted.shares)
        value = Problem(table, wanted.costs).value(problem.of_tensor(thresholds))
        return (float(value.accuracy),), value, thresholds, T
    starts = [problem.of_tensor(t) for t in (*candidates_of(table), *shares.geometric(table))]
    best = max(starts, key=lambda t: goal.rank(problem.value(t)))
    found = search(problem, goal, [best])
    value = problem.value(found)
    return goal.rank(value), value, problem.as_tensor(found), T
