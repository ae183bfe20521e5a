"""What thresholds give on a table: accuracy, FLOPs and exit shares, with intervals.

Shapes: E exits, N samples, C classes. Needs SciPy (the extra `train`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .artefact import Estimate, Exit, Group, Measured
from .exit_table import ExitTable

LEVEL = 0.95  # of all intervals


def estimate(k: int, n: int, level: float = LEVEL) -> Estimate:
    """The share k of n and its interval: Clopper and Pearson, "The use of confidence or fiducial
    limits", Biometrika 1934. n >= 1."""
    low, high = interval(np.asarray(k), np.asarray(n), level)
    return Estimate(k / n, float(low), float(high))


def interval(k: Any, n: Any, level: float) -> tuple[Any, Any]:
    """The ends of Clopper and Pearson's interval for k of n, arrays of one shape. They need not be
    whole numbers: weighted samples count as fewer."""
    from scipy.special import betaincinv  # type: ignore[import-untyped]

    half = (1 - level) / 2
    low = np.where(k > 0, betaincinv(np.where(k > 0, k, 1), n - k + 1, half), 0.0)
    high = np.where(k < n, betaincinv(k + 1, np.where(k < n, n - k, 1), 1 - half), 1.0)
    return low, high


def measured(
    table: ExitTable,
    thresholds: Tensor,
    costs: Sequence[float] | None = None,
    *,
    ms: float | None = None,
    groups: Mapping[str, Sequence[int]] | None = None,
) -> Measured:
    """What thresholds [E-1] or [E-1, C] give on a table of at least one sample.

    Args:
        costs: [E] FLOPs of a sample that leaves at each exit, as shares of the network without
            exits.
        ms: what to write as `Measured.ms`.
        groups: classes by the name of their group; groups without samples are left out.
    """
    E, N = table.statistic.shape
    if not N:
        raise ValueError("table: expected at least one sample, got none")
    exit_index = table.exit_index(thresholds)
    right = table.correct.gather(0, exit_index[None])[0]
    last_right = table.correct[-1]
    statistic = table.statistic.gather(0, exit_index[None])[0]
    exits = []
    for e in range(E):
        here = exit_index == e
        n = int(here.sum())
        accuracy = estimate(int(right[here].sum()), n) if n else None
        mean = float(statistic[here].double().mean()) if n else None
        finite = mean is not None and np.isfinite(mean)
        exits.append(Exit(estimate(n, N), accuracy, mean if finite else None))
    share = (
        None if costs is None else sum(c * x.share.value for c, x in zip(costs, exits, strict=True))
    )
    found = {}
    for name, classes in (groups or {}).items():
        inside = torch.isin(table.target, torch.as_tensor(list(classes), dtype=torch.int64))
        n = int(inside.sum())
        if n:
            counts = torch.bincount(exit_index[inside], minlength=E).tolist()
            found[name] = Group(
                n,
                estimate(int(right[inside].sum()), n),
                estimate(int(last_right[inside].sum()), n),
                tuple(estimate(k, n) for k in counts),
            )
    return Measured(
        samples=N,
        accuracy=estimate(int(right.sum()), N),
        accuracy_exits_off=estimate(int(last_right.sum()), N),
        exits=tuple(exits),
        flops_share=share,
        ms=ms,
        groups=found,
    )
