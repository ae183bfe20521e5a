"""Folds BatchNorm into the convolution before it, as inference in plain PyTorch wants it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ["fold"]


@torch.no_grad()
def fold(network: nn.Module, x: Tensor) -> nn.Module:
    """A copy of a network in evaluation mode, in which every BatchNorm that reads the output of a
    convolution is folded into it.

    A run on x shows which one reads which. Whether something else reads the same output does not
    show; the caller compares the results of the copy with those of the network.
    """
    network = copy.deepcopy(network)
    paths = {m: name for name, m in network.named_modules()}
    for conv, norm in _pairs(network, x):
        network.set_submodule(
            paths[conv], fuse_conv_bn_eval(conv, norm, isinstance(conv, _ConvTransposeNd))
        )
        network.set_submodule(paths[norm], _after(norm))
    return network


def _pairs(network: nn.Module, x: Tensor) -> list[tuple[_ConvNd, Any]]:
    """(convolution, the BatchNorm that reads its output), both called once in a run on x."""
    calls: dict[nn.Module, int] = {}
    outputs: list[tuple[Tensor, _ConvNd]] = []
    pairs: list[tuple[_ConvNd, Any]] = []

    def note(module: nn.Module, args: tuple, output: Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        if isinstance(module, _ConvNd):
            outputs.append((output, module))
        else:
            pairs.extend((conv, module) for read, conv in outputs if args and args[0] is read)

    kinds = (_ConvNd, _BatchNorm)
    looked_at = [m for m in network.modules() if isinstance(m, kinds) and _can_be_folded(m)]
    hooks = [module.register_forward_hook(note) for module in looked_at]
    try:
        network(x.clone(memory_format=torch.preserve_format))
    finally:
        for hook in hooks:
            hook.remove()
    return [(c, n) for c, n in pairs if calls[c] == calls[n] == 1 and n.running_mean is not None]


def _can_be_folded(module: nn.Module) -> bool:
    """No hooks, no parametrisation, and for norms a forward that `_after` knows."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return False
    if hasattr(module, "parametrizations"):
        return False
    return (
        (isinstance(module, _ConvNd) and type(module).forward.__module__ == _ConvNd.__module__)
        or type(module).forward is _BatchNorm.forward
        or type(module).__name__ == "BatchNormAct2d"
    )


def _after(norm: Any) -> nn.Module:
    """What a norm does beside normalising: timm's BatchNormAct2d has dropout and activation."""
    if type(norm).__name__ == "BatchNormAct2d":
        return nn.Sequential(norm.drop, norm.act)
    return nn.Identity()
