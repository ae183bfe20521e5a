"""A context manager that sets training or evaluation mode for a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
    each at the end.

    Networks override `train()`, for example to drop what they cached in evaluation, because the
    weights may change. So overridden ones are called before and after the block. The flags do not
    depend on them, because others freeze BatchNorm.
    """
    before = {module: module.training for module in model.modules()}
    inside = {module: training for module in before if only(module)}
    try:
        _tell(inside)
        _set({**before, **inside})
        yield
    finally:
        _tell({module: before[module] for module in inside})
        _set(before)


def _tell(flags: Mapping[nn.Module, bool]) -> None:
    """Calls overridden `train()`, with the other mode first, so that all see a change."""
    for module, flag in flags.items():
        if getattr(module.train, "__func__", None) is not nn.Module.train:
            module.train(not flag)
            module.train(flag)


def _set(flags: Mapping[nn.Module, bool]) -> None:
    for module, flag in flags.items():
        module.training = flag
