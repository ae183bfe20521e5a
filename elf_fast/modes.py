"""Training and evaluation mode for a while."""

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
    """Sets `training` everywhere, or in the modules that `only` chooses, and restores each module's
    own flag. Not through train(): some networks override it, to freeze BatchNorm for one."""
    before = [(module, module.training) for module in model.modules() if only(module)]
    try:
        for module, _ in before:
            module.training = training
        yield
    finally:
        for module, flag in before:
            module.training = flag
