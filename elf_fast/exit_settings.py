"""Converts a user's settings of the exits to checked tensors.

Shapes: C classes, E exits. Every exit but the last has a threshold and a temperature.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .criteria import Criterion

__all__ = ["classes_of", "exit_weights", "temperatures", "thresholds"]


def thresholds(
    name: str, value: Any, exits: int, criterion: Criterion, classes: int | None = None
) -> Tensor:
    """[E-1] or [E-1, C] float32 from a scalar, E-1 values or [E-1, C]; exits: E-1.

    Args:
        classes: C, if it is known.

    Raises:
        TypeError, ValueError: another shape, or values outside the criterion's range.
    """
    columns = "C" if classes is None else str(classes)
    shape = f"a scalar, {exits} values (one per exit but the last) or [{exits}, {columns}]"
    t = _per_exit(name, value, exits, shape, dims=(1, 2))
    if t.dim() == 2 and classes is not None and t.shape[1] != classes:
        raise ValueError(f"{name}: expected {shape}, one per class, got shape {list(t.shape)}")
    if not t.is_meta:
        checks.threshold_values(name, t, criterion)
    return t


def temperatures(value: Any, exits: int) -> Tensor:
    """[E-1] float32 from a scalar or E-1 values > 0; exits: E-1."""
    shape = f"a scalar or {exits} values (one per exit but the last)"
    t = _per_exit("temperatures", value, exits, shape, dims=(1,))
    if not t.is_meta:
        checks.positive("temperatures", t)
    return t


def exit_weights(value: Any, exits: int) -> tuple[float, ...]:
    """E numbers >= 0 from a scalar or E values; exits: E."""
    shape = f"a scalar or {exits} values"
    t = _per_exit("exit_weights", value, exits, shape, dims=(1,), dtype=torch.float64)
    for v in t.tolist():
        checks.at_least("exit_weights", v, 0.0)
    return tuple(t.tolist())


def _per_exit(
    name: str,
    value: Any,
    exits: int,
    shape: str,
    *,
    dims: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    try:
        device = checks.device_for(value)
        given = torch.as_tensor(value, device=device)
        if given.dtype == torch.bool or given.is_complex():
            raise TypeError
        t = torch.as_tensor(value, dtype=dtype, device=device).detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected {shape}, got {checks.describe(value)}") from error
    if t.dim() == 0:
        t = t.expand(exits).clone()
    if t.dim() not in dims or t.shape[0] != exits:
        raise ValueError(f"{name}: expected {shape}, got shape {list(t.shape)}")
    return t


def classes_of(heads: nn.ModuleList) -> int | None:
    """C, if the last layer of a head defines it. None: only a forward pass can tell."""
    for head in heads:
        while isinstance(head, nn.Sequential) and len(head):
            head = head[-1]
        layer = getattr(head, "classifier", head)
        classes = getattr(layer, "out_features", None)
        if isinstance(layer, nn.Module) and isinstance(classes, int):
            return classes
    return None
