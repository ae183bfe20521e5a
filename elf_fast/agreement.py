"""Runs the stages of a network beside the network, and refuses stages that compute otherwise."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parameter import is_lazy

from . import checks
from .memory import is_out_of_memory
from .modes import mode
from .stages import work_on_copy
from .tracing import BY_HAND

__all__ = ["buffers_kept", "features_and_logits"]


def features_and_logits(
    backbone: nn.Module,
    stages: Sequence[nn.Module],
    exits: Sequence[str],
    x: Tensor,
    *,
    in_training: bool = True,
) -> list[Tensor]:
    """[features at every exit ..., logits] of a batch x [N, ...], in evaluation mode. A stage that
    writes into its input is changed to work on a copy, because the head before it may need these
    features for its gradient.

    Args:
        in_training: compare gradients and what the network does in training mode, too.

    Raises:
        ValueError: the backbone does not take x; features or logits have another shape than
            expected; the stages give other logits or gradients than the backbone.
    """
    expected = _expected(backbone, x)
    values = _run(stages, exits, x)
    _check_logits(values[-1], expected)
    if in_training:
        _check_gradients(backbone, stages, x)
        _check_training(backbone, stages, x)
    _check_shapes(values, exits, len(x))
    _check_another_size(stages, exits, x)
    return values


def _expected(backbone: nn.Module, x: Tensor) -> Tensor:
    with _evaluation(backbone, x), torch.no_grad():
        try:
            return backbone(x.clone())
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f"example_input: expected a batch that the backbone takes, got "
                f"{checks.describe(x)}: {type(error).__name__}: {error}"
            ) from error


def _run(stages: Sequence[nn.Module], exits: Sequence[str], x: Tensor) -> list[Tensor]:
    """What every stage returns."""
    with _evaluation(nn.ModuleList(stages), x), torch.no_grad():
        values = [x.clone()]
        for e, stage in enumerate(stages):
            version = values[-1]._version
            value = stage(values[-1])
            if e > 0 and values[-1]._version != version:
                work_on_copy(stage)
            if not isinstance(value, Tensor):
                whole = "backbone: expected its forward"
                where = f'exits: expected "{exits[e]}"' if e < len(exits) else whole
                raise ValueError(f"{where} to return one tensor, got {type(value).__name__}")
            values.append(value)
    return values[1:]


@contextlib.contextmanager
def _evaluation(network: nn.Module, x: Tensor) -> Iterator[None]:
    """Evaluation mode outside autocast and inference mode. Buffers keep their values."""
    # The heads take the dtype of the features as their own, and autocast would change it.
    outside_autocast = torch.autocast(x.device.type, enabled=False)
    with (
        mode(network, training=False),
        torch.inference_mode(False),
        outside_autocast,
        buffers_kept(network),
    ):
        yield


@contextlib.contextmanager
def buffers_kept(network: nn.Module) -> Iterator[None]:
    """Gives the buffers their values back in the end. So all runs that are compared start from the
    same, also where a forward writes into buffers in evaluation."""
    before = [
        (module._buffers, name, buffer, buffer.clone())
        for module in network.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.layout is torch.strided and not is_lazy(buffer)
    ]
    try:
        yield
    finally:
        for buffers, name, buffer, value in before:
            buffers[name] = buffer
            if not (buffer.is_meta or torch.equal(buffer, value)):
                with torch.no_grad():
                    buffer.copy_(value)


def _check_another_size(stages: Sequence[nn.Module], exits: Sequence[str], x: Tensor) -> None:
    """Features and logits of n samples must have n rows for another n, too. On one batch alone a
    dimension of the same size can pass for that of the samples, such as T in [T, N, D]."""
    n = 3 if len(x) == 2 else 2
    with _evaluation(nn.ModuleList(stages), x), torch.no_grad():
        values, value = [], x[torch.arange(n) % len(x)]
        try:
            for stage in stages:
                value = stage(value)
                values.append(value)
        except Exception as error:  # a network that takes one size only
            if is_out_of_memory(error):
                raise
    _check_shapes(values, exits, n)


def _check_logits(logits: Tensor, expected: Tensor) -> None:
    if not are_close(logits, expected):
        raise ValueError(
            "backbone: expected its stages to compute its logits on example_input; they differ: "
            "a state or a decision in Python outside the named modules, such as one on the type of "
            f"a value, is lost in tracing; {BY_HAND}"
        )


def _check_gradients(backbone: nn.Module, stages: Sequence[nn.Module], x: Tensor) -> None:
    """The stages must give the backbone's parameters the gradients that the backbone gives them, on
    two samples and in evaluation mode. A backbone that cannot be differentiated in this mode is not
    compared."""
    chain = nn.Sequential(*stages)
    named = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    try:
        expected = _gradients(backbone, list(named.values()), x[:2])
    except (RuntimeError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        return
    found = _gradients(chain, list(named.values()), x[:2])
    pairs = zip(named, found, expected, strict=True)
    wrong = [name for name, ours, theirs in pairs if not are_close(ours, theirs)]
    if wrong:
        shown = ", ".join(wrong[:4]) + (", ..." if len(wrong) > 4 else "")
        raise ValueError(
            "backbone: expected its stages to give its parameters its gradients on example_input; "
            f"those of {shown} differ: what the forward computes from parameters in Python, "
            f"outside the modules that it calls, is lost in tracing; {BY_HAND}"
        )


def _gradients(
    network: nn.Module, parameters: Sequence[nn.Parameter], x: Tensor
) -> Sequence[Tensor | None]:
    """By parameter, the gradient of a weighted sum of the logits, or None."""
    with _evaluation(network, x), torch.enable_grad():
        logits = network(x.clone())
        if not logits.requires_grad:
            return [None] * len(parameters)
        weights = torch.arange(logits.numel(), device=logits.device).cos().view_as(logits)
        total = (logits.float() * weights).sum()
        return torch.autograd.grad(total, parameters, allow_unused=True)


def _check_training(backbone: nn.Module, stages: Sequence[nn.Module], x: Tensor) -> None:
    if not _same_in_training(backbone, nn.Sequential(*stages), x[:2]):
        raise ValueError(
            "backbone: expected its stages to compute its logits on example_input in training "
            "mode, too, with the same random numbers; they differ: a state or a decision in Python "
            f"outside the named modules is lost in tracing; {BY_HAND}"
        )


def _same_in_training(backbone: nn.Module, chain: nn.Module, x: Tensor) -> bool:
    """Whether both give the same logits in training mode from the same random numbers. Copies run,
    so that nothing changes. A backbone that cannot be copied or run in this mode, also for lack of
    memory, or that gives other logits each time, is not compared."""
    if distributed.is_available() and distributed.is_initialized():
        return True  # the backbone may wait for other processes, which may not be here
    try:
        expected, found = _logits_in_training(backbone, x), _logits_in_training(chain, x)
        return are_close(found, expected) or not are_close(
            _logits_in_training(backbone, x), expected
        )
    except Exception:
        return True


@torch.enable_grad()
def _logits_in_training(network: nn.Module, x: Tensor) -> Tensor:
    """The logits of a copy with the same parameters. Global random generators keep their states."""
    states = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    outside_autocast = torch.autocast(x.device.type, enabled=False)
    try:
        with torch.random.fork_rng(devices), torch.inference_mode(False), outside_autocast:
            twin = copy.deepcopy(network, {id(p): p for p in network.parameters()})
            with mode(twin, training=True):
                return twin(x.clone())
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def are_close(ours: Tensor | None, theirs: Tensor | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    if ours.shape != theirs.shape:
        return False
    if torch.equal(ours, theirs):
        return True
    largest = theirs.float().abs().nan_to_num(0, 0, 0).amax().item() if theirs.numel() else 0.0
    return torch.allclose(
        ours.float(), theirs.float(), rtol=1e-2, atol=1e-2 * largest, equal_nan=True
    )


def _check_shapes(values: Sequence[Tensor], exits: Sequence[str], N: int) -> None:
    """values: the features by exit and then the logits; the list may end early."""
    for name, value in zip(exits, values, strict=False):
        shape = value.shape
        fits = len(shape) in (2, 3, 4) and shape[0] == N and 0 not in shape
        if not (fits and value.is_floating_point()):
            raise ValueError(
                f'exits: expected "{name}" to return features [N, D], [N, T, D], [N, D, T], '
                f"[N, D, H, W] or [N, H, W, D] with N = {N}, got {checks.describe(value)}"
            )
    for logits in values[len(exits) :]:
        if logits.dim() != 2 or logits.shape[0] != N:
            raise ValueError(
                f"backbone: expected logits of shape [{N}, C], got {checks.describe(logits)}"
            )
