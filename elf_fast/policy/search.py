"""Searches thresholds for all exits jointly, with the exact effect of earlier exits.

If all thresholds but those of one exit are fixed, the best cut of that exit is exact: sort its
samples by how sure it is of them, and add up what each of those that reach the exit gains by
leaving here instead of later. `_climb` repeats this over the exits for accuracy less a price times
cost, for many prices; `improve` does so under the limits. No step makes a solution worse, so the
result is at least as good as every start that was given.

Shapes: E exits, N samples, K cells of an exit. A cell is a set of predicted classes that share a
threshold: all classes, one class or a group of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .exit_table import ExitTable

#: Cuts tried per cell, at equal shares of its samples. More fit the calibration data better and
#: new data no better: docs/policy.md.
CANDIDATES = 40
#: Prices of cost in accuracy. Between them the last step, under the limits, finds its own way.
_PRICES = (0.0, *np.geomspace(1e-3, 10.0, 40).tolist())
_SWEEPS = 8  # the search mostly stands still after three


class Goal(NamedTuple):
    """The limits of a policy. Without `least` the most accurate one within them is wanted, and the
    cheaper of equals; with it the cheapest that is at least so accurate."""

    most: float = math.inf  # mean cost
    least: float | None = None  # accuracy
    few_least: float | None = None  # accuracy on the samples of `Problem.few`

    def rank(self, value: Value) -> tuple[float, ...]:
        """Larger is better; first of all, limits that are not missed."""
        return tuple(float(part) for part in self.ranks(value))

    def ranks(self, value: Value) -> tuple[Any, Any, Any]:
        """The three parts of `rank`, for values whose fields are numbers or arrays."""
        missed = np.maximum(0.0, value.cost - self.most)
        for found, limit in ((value.accuracy, self.least), (value.few, self.few_least)):
            if limit is not None:
                missed = missed + np.maximum(0.0, limit - found)
        # Sums of many numbers differ by rounding.
        missed, accuracy, cost = (
            np.round(part, 10) for part in (missed, value.accuracy, value.cost)
        )
        return (-missed, accuracy, -cost) if self.least is None else (-missed, -cost, accuracy)


class Value(NamedTuple):
    accuracy: Any  # in [0, 1]
    cost: Any  # mean per sample
    few: Any  # accuracy on the samples of `Problem.few`


class Problem:
    """A table, prepared for searches.

    Args:
        costs: [E] of a sample that leaves at each exit, rising.
        cells: [E-1, C] which threshold of an exit belongs to a predicted class, 0..K-1; None: one
            for all classes.
        few: [N] bool, the samples whose accuracy `Goal.few_least` limits.
    """

    def __init__(
        self,
        table: ExitTable,
        costs: Sequence[float],
        *,
        cells: Tensor | None = None,
        few: Tensor | None = None,
        candidates: int = CANDIDATES,
    ) -> None:
        self.E, self.N = table.statistic.shape
        if not self.N:
            raise ValueError("table: expected at least one sample, got none")
        sign = 1.0 if table.criterion.larger_is_surer else -1.0
        self.table, self.sign = table, sign
        #: [E-1, N] how sure; NaN never leaves.
        self.score = np.nan_to_num(sign * table.statistic[:-1].numpy(), nan=-np.inf, posinf=np.inf)
        self.right = table.correct.numpy().astype(np.float64)  # [E, N]
        self.costs = np.asarray(costs, np.float64)
        few_samples = np.ones(self.N, bool) if few is None else few.numpy()
        self.few = few_samples / max(1, few_samples.sum())  # [N] weights
        self.cells = None if cells is None else cells.numpy()
        self.cell = self._cells_of_samples(table.prediction[:-1])
        self.parts = [_Cuts(self.score[e], self.cell[e], candidates) for e in range(self.E - 1)]

    def _cells_of_samples(self, prediction: Tensor) -> np.ndarray:
        """[E-1, N]."""
        if self.cells is None:
            return np.zeros(prediction.shape, np.int64)
        return np.take_along_axis(self.cells, prediction.numpy(), 1)

    def never(self) -> list[np.ndarray]:
        """Thresholds at which all exits are off: a list of [K], as all thresholds here, in units of
        `score`."""
        return [np.full(part.K, np.inf) for part in self.parts]

    def leaves(self, thresholds: list[np.ndarray], e: int) -> np.ndarray:
        """[N] who passes the test of exit e."""
        return (self.score[e] >= thresholds[e][self.cell[e]]) & (self.score[e] > -np.inf)

    def exit_index(self, thresholds: list[np.ndarray]) -> np.ndarray:
        """[N] the exit that every sample takes."""
        index = np.full(self.N, self.E - 1)
        for e in reversed(range(self.E - 1)):
            index[self.leaves(thresholds, e)] = e
        return index

    def value(self, thresholds: list[np.ndarray]) -> Value:
        index = self.exit_index(thresholds)
        right = self.right[index, np.arange(self.N)]
        return Value(right.mean(), self.costs[index].mean(), right @ self.few)

    def between(self, thresholds: list[np.ndarray], share: float) -> list[np.ndarray]:
        """Thresholds between exits off (share 0) and those given (1): at each exit, `share` of the
        samples pass that pass the test of those given, the surest ones. They pass there, too."""
        found = self.never()
        for e, part in enumerate(self.parts):
            passes = self.leaves(thresholds, e)
            for k in range(part.K):
                surest = np.sort(self.score[e][passes & (self.cell[e] == k)])[::-1]
                n = math.floor(share * len(surest) + 1e-9)
                if n == len(surest):
                    found[e][k] = thresholds[e][k]
                elif n:
                    found[e][k] = surest[n - 1]
        return found

    def as_tensor(self, thresholds: list[np.ndarray]) -> Tensor:
        """[E-1] or [E-1, C] float32, in units of the criterion."""
        criterion = self.table.criterion
        if self.cells is None:
            rows = np.array([t[0] for t in thresholds])
        else:
            rows = np.stack([t[self.cells[e]] for e, t in enumerate(thresholds)])
        found = torch.from_numpy(self.sign * rows.reshape(self.E - 1, *rows.shape[1:])).float()
        everyone = criterion.everyone
        if not math.isfinite(everyone):  # a score without bounds
            everyone = -self.sign * torch.finfo(torch.float32).max
        return found.masked_fill(found == -self.sign * math.inf, everyone)

    def of_tensor(self, thresholds: Tensor) -> list[np.ndarray]:
        """The reverse, for thresholds [E-1] or [E-1, C] that are equal inside every cell."""
        t = self.sign * thresholds.double().numpy()
        if self.cells is None:
            return [np.array([v]) for v in (t if t.ndim == 1 else t[:, 0])]
        t = np.broadcast_to(t[:, None], self.cells.shape) if t.ndim == 1 else t
        found = self.never()
        for e, part in enumerate(found):
            part[self.cells[e]] = t[e]
        return found


class _Cuts:
    """The samples of one exit sorted by cell and sureness, and where each cell may be cut."""

    def __init__(self, score: np.ndarray, cell: np.ndarray, candidates: int) -> None:
        self.K = int(cell.max()) + 1
        self.order = np.lexsort((-score, cell))
        sorted_score = score[self.order]
        begins = np.searchsorted(cell[self.order], np.arange(self.K + 1))
        self.begin, n = begins[:-1], np.diff(begins)
        #: [K, Q] how many of the surest samples of a cell leave; between equal scores there is no
        #: cut, so it is moved on to the next.
        shares = np.linspace(0, 1, candidates + 1)
        count = np.floor(shares[None] * n[:, None] + 0.5).astype(np.int64)
        last = self.begin[:, None] + count - 1  # the last one that leaves
        after = np.minimum(last + 1, len(score) - 1)
        inside = (count > 0) & (count < n[:, None])
        at = np.where(count > 0, sorted_score[np.maximum(last, 0)], np.inf)
        following = np.where(inside, sorted_score[after], -np.inf)
        # Halfway between two scores, where rounding decides nothing.
        with np.errstate(invalid="ignore"):
            middle = np.where(inside, at + (following - at) / 2, -np.inf)
        middle = np.where(inside & ~((middle > following) & (middle <= at)), at, middle)
        self.threshold = np.where(count > 0, middle, np.inf)  # [K, Q]
        self.count = self._counts(sorted_score, n)

    def _counts(self, sorted_score: np.ndarray, n: np.ndarray) -> np.ndarray:
        """[K, Q] how many samples of a cell really leave at each of its thresholds."""
        found = np.empty(self.threshold.shape, np.int64)
        for k, (begin, of_cell) in enumerate(zip(self.begin, n, strict=True)):
            rising = sorted_score[begin : begin + of_cell][::-1]
            real = of_cell - np.searchsorted(rising, -np.inf, side="right")
            left = of_cell - np.searchsorted(rising, self.threshold[k], side="left")
            found[k] = np.minimum(left, real)
        return found

    def sums(self, gains: np.ndarray) -> np.ndarray:
        """[K, Q] the sum of gains [N] over the samples of a cell that leave at each threshold."""
        total = np.concatenate([[0.0], np.cumsum(gains[self.order])])
        return total[self.begin[:, None] + self.count] - total[self.begin][:, None]


def _later(problem: Problem, thresholds: list[np.ndarray], e: int) -> np.ndarray:
    """[N] the exit after e that each sample takes if it passes e."""
    index = np.full(problem.N, problem.E - 1)
    for later in reversed(range(e + 1, problem.E - 1)):
        index[problem.leaves(thresholds, later)] = later
    return index


def gains_of_leaving(
    problem: Problem, thresholds: list[np.ndarray], e: int
) -> tuple[np.ndarray, np.ndarray]:
    """([N], [N]) what each sample adds to correct answers and to cost if it leaves at exit e
    instead of later; 0 for those that leave before."""
    index = _later(problem, thresholds, e)
    reach = np.ones(problem.N)
    for before in range(e):
        reach[problem.leaves(thresholds, before)] = 0.0
    right = problem.right[e] - problem.right[index, np.arange(problem.N)]
    return right * reach, (problem.costs[e] - problem.costs[index]) * reach


def _climb(problem: Problem, thresholds: list[np.ndarray], price: float) -> list[np.ndarray]:
    """Raises accuracy - price * cost until no exit can be improved alone."""
    thresholds = [t.copy() for t in thresholds]
    best = -math.inf
    for _ in range(_SWEEPS):
        for e in reversed(range(problem.E - 1)):
            part = problem.parts[e]
            right, cost = gains_of_leaving(problem, thresholds, e)
            sums = part.sums(right - price * cost)
            # The last of equals leaves the most samples, and so is the cheapest.
            at = sums.shape[1] - 1 - np.argmax(np.round(sums[:, ::-1], 9), axis=1)
            thresholds[e] = part.threshold[np.arange(part.K), at]
        value = problem.value(thresholds)
        now = value.accuracy - price * value.cost
        if now <= best + 1e-12:
            break
        best = now
    return thresholds


def improve(problem: Problem, thresholds: list[np.ndarray], goal: Goal) -> list[np.ndarray]:
    """Moves one threshold at a time to where it serves the goal best, until none does."""
    thresholds = [t.copy() for t in thresholds]
    best = goal.rank(problem.value(thresholds))
    for _ in range(_SWEEPS):
        before = best
        for e in reversed(range(problem.E - 1)):
            part = problem.parts[e]
            right, cost = gains_of_leaving(problem, thresholds, e)
            sums = [
                part.sums(g) for g in (right / problem.N, cost / problem.N, right * problem.few)
            ]
            leaves = problem.leaves(thresholds, e)
            value = problem.value(thresholds)
            own = [np.bincount(problem.cell[e], g * leaves, part.K)
                   for g in (right / problem.N, cost / problem.N, right * problem.few)]  # fmt: skip
            for k in range(part.K):
                moved = Value(*(v + s[k] - o[k] for v, s, o in zip(value, sums, own, strict=True)))
                ranks = goal.ranks(moved)
                at = np.lexsort(ranks[::-1])[-1]
                rank = tuple(float(r[at]) for r in ranks)
                if rank > best:
                    thresholds[e][k] = part.threshold[k, at]
                    value, best = Value(*(v[at] for v in moved)), rank
        if best <= before:
            break
    return thresholds


def frontier(problem: Problem) -> list[list[np.ndarray]]:
    """Thresholds from all exits off to the cheapest: the best that was found for each price of
    cost."""
    found, thresholds = [problem.never()], problem.never()
    for price in _PRICES:
        thresholds = _climb(problem, thresholds, price)
        found.append(thresholds)
    return found


def search(
    problem: Problem, goal: Goal, starts: Iterable[list[np.ndarray]] = ()
) -> list[np.ndarray]:
    """The best thresholds that were found, at least as good as each of `starts`."""
    given = [problem.never(), *starts]
    along = frontier(problem)
    # The two best of the frontier lie on either side of the limit.
    along.sort(key=lambda t: goal.rank(problem.value(t)), reverse=True)
    tried = [improve(problem, start, goal) for start in [*given, *along[:2]]]
    return max(tried, key=lambda t: goal.rank(problem.value(t)))
