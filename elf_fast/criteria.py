"""The exit criteria: what an exit's test reads, and whether larger or smaller values are surer.

The reference, the checks, the operators, calibration, the settings of a run, the benchmarks and
the tests all read `TABLE`. `csrc/criterion.h` and `kernels/row_state.py` repeat its codes, and a
test compares them. CONTRIBUTING.md says how to add one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["TABLE", "Criterion", "Score", "by_code", "by_name", "find"]

#: A user's own criterion: logits [n, C], divided by the temperature, -> score [n].
Score = Callable[[Tensor], Tensor]

#: Thresholds that a sweep tries for a criterion in [0, 1]. At the first ones most samples leave.
_GRID = (*(k / 100 for k in range(100)), 0.995, 0.999)


@dataclass(frozen=True)
class Criterion:
    """One criterion. Its statistic [n] of logits [n, C] says how sure an exit is of each sample."""

    name: str
    #: The number of the criterion in calls of operators; None: no kernel computes it.
    code: int | None
    #: True: a sample leaves at a statistic >= threshold. False: at a statistic <= threshold.
    larger_is_surer: bool = True
    #: The statistic's range. Thresholds lie in it.
    low: float = 0.0
    high: float = 1.0
    #: The user's own function; None: the statistic has a formula in `reference.py`.
    score: Score | None = None

    @property
    def off(self) -> float:
        """The threshold at which no sample leaves."""
        return math.inf if self.larger_is_surer else -math.inf

    @property
    def everyone(self) -> float:
        """The threshold at which every sample leaves, except those whose statistic is NaN."""
        return self.low if self.larger_is_surer else self.high

    @property
    def is_bounded(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)

    def passes(self, statistic: Tensor, threshold: float | Tensor) -> Tensor:
        """Whether each sample is sure enough to leave, bool. NaN never passes."""
        if self.larger_is_surer:
            return statistic >= threshold
        return statistic <= threshold

    def candidates(self, statistic: Tensor) -> tuple[float, ...]:
        """Thresholds for a sweep, from the one at which most samples leave to `off`.

        A fixed grid over a bounded range. Without bounds, the statistic's own percentiles.

        Args:
            statistic: the statistic at the exits, of any shape. NaN is ignored.
        """
        if self.is_bounded:
            span = self.high - self.low
            rising = [self.low + span * t for t in _GRID]
            falling = [round(self.high - span * t, 3) for t in _GRID]
            return (*(rising if self.larger_is_surer else falling), self.off)
        known = statistic[statistic.isfinite()].double()
        if not known.numel():
            return (self.off,)
        levels = torch.linspace(0, 1, 101, dtype=torch.float64, device=known.device)
        found = dict.fromkeys(torch.quantile(known, levels).tolist())
        return (*(found if self.larger_is_surer else reversed(list(found))), self.off)


#: The criteria by name.
TABLE = {
    criterion.name: criterion
    for criterion in (
        Criterion("confidence", code=0),
        Criterion("margin", code=1),
        Criterion("entropy", code=2, larger_is_surer=False),
    )
}


def by_name(name: Any) -> Criterion:
    """The criterion with this name. Kernels compute it.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or name not in TABLE:
        raise ValueError(f"criterion: expected one of {', '.join(TABLE)}, got {name!r}")
    return TABLE[name]


def by_code(code: int) -> Criterion:
    """The criterion with this code.

    Raises:
        ValueError: there is none.
    """
    for criterion in TABLE.values():
        if criterion.code == code:
            return criterion
    known = ", ".join(str(criterion.code) for criterion in TABLE.values())
    raise ValueError(f"criterion: expected one of the codes {known}, got {code}")


def find(criterion: str | Score | Criterion) -> Criterion:
    """The criterion with a name, or one made from a callable (logits [n, C]) -> score [n]: a larger
    score is surer, and scores may be any numbers. A `Criterion` is returned as it is.

    Raises:
        ValueError, TypeError: no such name, or neither a name nor a callable.
    """
    if isinstance(criterion, Criterion):
        return criterion
    if isinstance(criterion, str):
        return by_name(criterion)
    if not callable(criterion):
        raise TypeError(
            f"criterion: expected one of {', '.join(TABLE)}, or a callable (logits [n, C]) -> "
            f"score [n], got {criterion!r} ({type(criterion).__name__})"
        )
    name = getattr(criterion, "__name__", type(criterion).__name__)
    return Criterion(name, None, low=-math.inf, high=math.inf, score=criterion)
