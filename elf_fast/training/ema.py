"""The exponential moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..modules import ELF


class Average:
    """a <- decay a + (1 - decay) w after every step, for parameters and running statistics.

    Other buffers are copied. They hold settings, for example thresholds, which must not be
    averaged: inf would become NaN, and a changed threshold would take effect slowly.

    Attributes:
        model: a copy of the model, with the averaged weights.
    """

    def __init__(self, model: ELF, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        averaged, theirs = _averaged(self.model), _averaged(model)
        torch._foreach_lerp_(
            list(averaged.values()), [theirs[name] for name in averaged], 1 - self.decay
        )
        new = dict(model.named_buffers())
        for name, buffer in self.model.named_buffers():
            if name not in averaged:
                buffer.copy_(new[name])


def _averaged(model: nn.Module) -> dict[str, Tensor]:
    statistics = {
        name: buffer
        for name, buffer in model.named_buffers()
        if name.endswith(("running_mean", "running_var"))
    }
    return {**dict(model.named_parameters()), **statistics}
