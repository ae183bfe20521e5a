"""Notices that the weights, of which an engine holds copies, have changed in the model."""

from __future__ import annotations

from operator import attrgetter

from torch import Tensor, nn

from ..base import ELFBase

__all__ = ["Frozen"]

_version = attrgetter("_version")


class Frozen:
    """Floating parameters and buffers of a model's stages and heads, as they are now.

    `check` sees what is written through the tensors (an optimiser, `load_state_dict`, `copy_`), and
    models that are moved, converted or loaded with `assign=True` as a whole. It does not see writes
    through `.data`, to tensors made in inference mode, or a single tensor that is replaced.
    """

    def __init__(self, model: ELFBase) -> None:
        parts = [*model.stages, *model.heads]
        tensors = {
            id(t): t
            for part in parts
            for t in (*part.parameters(), *part.buffers())
            if t.is_floating_point() and not t.is_inference()
        }
        self._tensors = list(tensors.values())
        self._versions = self._sum()
        #: The first parameter of each part, with its memory.
        self._first = [
            (module._parameters, name, p, p.data_ptr())
            for part in parts
            for module, name, p in _parameters(part)[:1]
        ]

    def _sum(self) -> int:
        return sum(map(_version, self._tensors))

    def check(self) -> None:
        """Raises RuntimeError if a weight has changed."""
        moved = any(
            held.get(name) is not p or p.data_ptr() != memory
            for held, name, p, memory in self._first
        )
        if moved or self._sum() != self._versions:
            raise RuntimeError(
                "engine: expected the weights that the model had when it was compiled, got a model "
                "whose weights have changed since; compile it again"
            )


def _parameters(part: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    return [
        (module, name, p)
        for module in part.modules()
        for name, p in module._parameters.items()
        if p is not None
    ]
