"""Thresholds at which given shares of the samples leave.

Budgeted batch classification of MSDNet (Huang et al., arXiv 1703.09844, section 5): the share of
the samples that leave at exit k is proportional to q^k, for one number q.

Shapes: E exits, N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import checks
from .exit_table import ExitTable

#: The values of q that `geometric` tries, from nearly all at the first exit to nearly none.
QS = tuple(np.geomspace(0.02, 50.0, 60).tolist())


def shares(value: Any, exits: int) -> list[float]:
    """`value` [E], checked: shares of at least 0 that add up to 1."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"exit_shares: expected {exits} shares, got {checks.describe(value)}")
    found = [checks.number("exit_shares", v) for v in value]
    if len(found) != exits or min(found) < 0 or abs(sum(found) - 1) > 1e-3:
        raise ValueError(
            f"exit_shares: expected {exits} shares of at least 0 that add up to 1, one per exit, "
            f"got {value}"
        )
    return found


def geometric_shares(q: float, exits: int) -> list[float]:
    """[E] proportional to q^k for k = 1..E."""
    powers = np.power(q, np.arange(exits) - (0 if q < 1 else exits - 1))
    return (powers / powers.sum()).tolist()


def thresholds_for(table: ExitTable, wanted: Sequence[float]) -> Tensor:
    """[E-1] thresholds at which about the shares `wanted` [E] leave: at every exit the surest of
    the samples that reach it. Samples that are equally sure leave together."""
    criterion = table.criterion
    sign = 1.0 if criterion.larger_is_surer else -1.0
    E, N = table.statistic.shape
    here = torch.ones(N, dtype=torch.bool, device="cpu")
    found = []
    for e in range(E - 1):
        score = sign * table.statistic[e]
        reaching = score[here & ~score.isnan()].sort(descending=True).values
        n = min(len(reaching), round(wanted[e] * N))
        if n == 0:
            found.append(criterion.off)
            continue
        value = reaching[n - 1]
        here &= ~(score >= value)
        found.append(sign * float(value))
    return torch.tensor(found, dtype=torch.float32, device="cpu").reshape(E - 1)


def geometric(table: ExitTable) -> list[Tensor]:
    """Thresholds [E-1] of the geometric family, for each of `QS`."""
    E = len(table.statistic)
    return [thresholds_for(table, geometric_shares(q, E)) for q in QS]
