"""Parameters that a network excludes from weight decay."""

from __future__ import annotations

from fnmatch import fnmatch

from torch import nn

__all__ = ["undecayed"]


def undecayed(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name, the parameters that `no_weight_decay()` of the model or of a module in it names.

    timm's networks define this method: it returns names relative to the module, with the wildcards
    of `fnmatch`. A parameter with several names is listed under all of them.
    """
    found = {}
    for prefix, module in model.named_modules():
        method = getattr(module, "no_weight_decay", None)
        if callable(method):
            patterns = tuple(method())
            for name, parameter in module.named_parameters(remove_duplicate=False):
                if any(fnmatch(name, pattern) for pattern in patterns):
                    found[f"{prefix}.{name}".lstrip(".")] = parameter
    return found
