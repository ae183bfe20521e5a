"""A context manager that sets training or evaluation mode for a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["mode"]


@contextmanager
def mode(
    model: nn.Module,
    *,
    training: bool,
    only: Callable[[nn.Module], bool] = lambda module: True,
) -> Iterator[None]:
    """Sets `training` in all modules, or in those that `only` selects, and restores the flag of
    each at the end. It does not call `train()`, which some networks override, for example to freeze
    BatchNorm."""
    before = [(module, module.training) for module in model.modules() if only(module)]
    try:
        for module, _ in before:
            module.training = training
        yield
    finally:
        for module, flag in before:
            module.training = flag
