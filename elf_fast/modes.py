"""A context manager that sets training or evaluation mode for a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

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
    told = [m for m in inside if getattr(m.train, "__func__", None) is not nn.Module.train]
    kept = before if told else {module: before[module] for module in inside}
    try:
        _tell(told, inside)
        _set({**kept, **inside})
        yield
    finally:
        try:
            _tell(told, before)
        finally:
            _set(kept)


def _tell(modules: Sequence[nn.Module], flags: Mapping[nn.Module, bool]) -> None:
    """Calls their `train()`, with the other mode first, so that all see a change."""
    for module in modules:
        with suppress(NotImplementedError):  # as that of exported programs
            module.train(not flags[module])
            module.train(flags[module])


def _set(flags: Mapping[nn.Module, bool]) -> None:
    for module, flag in flags.items():
        module.training = flag
