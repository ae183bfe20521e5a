"""Temperatures by maximum likelihood (Guo et al., arXiv 1706.04599, section 4.2)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .exit_table import ExitTable

#: A perfectly separated table has no maximum: its likelihood grows as T falls to 0.
_LOW, _HIGH = 1e-3, 1e3
#: So many samples are enough for one number per exit.
_SAMPLES = 10_000


def fit(table: ExitTable) -> list[float]:
    """[E-1] temperatures of the early exits that maximise the likelihood of the targets under
    softmax(logits / T), each in [0.001, 1000]. Logits that are infinite or NaN do not count.

    Raises:
        ValueError: the table holds no logits.
    """
    if table.logits is None:
        raise ValueError("table: expected one that holds logits, got one without")
    return [_fit(z, table.target) for z in table.logits[:-1]]


def _fit(z: Tensor, target: Tensor) -> float:
    from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]

    rows = torch.arange(0, len(z), max(1, len(z) // _SAMPLES), device="cpu")
    z, target = z[rows].float(), target[rows]
    known = z.isfinite().all(1)
    z, target = z[known], target[known]
    if not len(z):
        return 1.0

    def loss(log_t: float) -> float:  # it has one minimum, because it is convex in 1 / T
        return float(F.cross_entropy(z / math.exp(log_t), target))

    bounds = math.log(_LOW), math.log(_HIGH)
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x)
