"""Parts of a network that do not train."""

from __future__ import annotations

import difflib

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..classifiers import classifiers

#: In place of a module: the whole backbone.
ALL = "all"


def freeze_(backbone: nn.Module, until: str) -> None:
    """Freezes the parameters up to and including those of the module `until`, in the order in which
    the network lists them, or `ALL`. The classifier is never frozen.

    Raises:
        ValueError: there is no such module with parameters, or no classifier is found.
    """
    named = dict(backbone.named_parameters(remove_duplicate=False))
    names = list(named)
    inside = [i for i, name in enumerate(names) if until == ALL or name.startswith(f"{until}.")]
    if not inside:
        modules = [name for name, _ in backbone.named_modules() if name]
        near = difflib.get_close_matches(until, modules) or modules
        raise ValueError(
            f"freeze_backbone: expected {ALL} or a module of {type(backbone).__name__} with "
            f"parameters, got {until!r}; near names: {', '.join(near[:5])}"
        )
    try:
        kept = {id(p) for layer in classifiers(backbone).values() for p in layer.parameters()}
    except ValueError as error:
        raise ValueError(f"freeze_backbone: {error}") from error
    for name in names[: inside[-1] + 1]:
        if id(named[name]) not in kept:
            named[name].requires_grad_(False)


def train_mode(model: nn.Module) -> None:
    """`model.train()`, but a BatchNorm whose parameters are frozen stays in evaluation mode, so
    that its running statistics do not change."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            own = list(module.parameters(recurse=False))
            if own and not any(parameter.requires_grad for parameter in own):
                module.eval()
