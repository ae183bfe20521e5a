"""Early exits on any network: `from_backbone` cuts it at the outputs of named modules.

torch.fx traces only the modules that contain the named ones (their ancestors); every other module
is called as it is. Control flow inside a block (stochastic depth, attention) is therefore
untouched and still follows `train()` and `eval()`. The trace is cut into stages, each a
`torch.fx.GraphModule` that shares the backbone's submodules and parameters under their own names.

Shapes: N samples, C classes, D channels, E exits (exit E is the network's own classifier).
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import checks, layouts
from .memory import is_out_of_memory
from .modes import mode
from .modules import ELF
from .stages import cut, work_on_copy
from .tracing import BY_HAND
from .weight_decay import undecayed

__all__ = ["from_backbone", "split"]


def from_backbone(
    backbone: nn.Module,
    exits: Sequence[str],
    num_classes: int,
    *,
    example_input: Tensor,
    conv: bool = False,
    layout: str | Mapping[str, str] | None = None,
    **elf_options: Any,
) -> ELF:
    """An `ELF` of a network, with an `ExitHead` at the output of each named module.

    The last stage returns the network's own logits, so its head is `nn.Identity`. Parameters and
    buffers are shared with the backbone, not copied; those that its forward never uses are in no
    stage. The backbone's `training` flags do not change. `elf_fast.unfuse` gives the plain PyTorch
    module.

    Args:
        backbone: maps a batch [N, ...] to logits [N, C]; further arguments of its forward take
            their defaults.
        exits: names of submodules, as `backbone.named_modules()` spells them, in the order in which
            they run. Only the output of the named module may cross the cut after it.
        num_classes: C.
        example_input: a batch [N, ...] on the backbone's device. It is run to find shapes and to
            compare the stages with the backbone: in evaluation mode, and on two samples in training
            mode with copies of the modules. Buffers keep their values. Its values do not matter.
        conv: `ExitHead(conv=True)`; features [N, D, H, W] only.
        layout: what features with 3 or 4 dimensions hold, for all exits or by name: "NCL"
            ([N, D, T], of nn.Conv1d), "NLC" (tokens [N, T, D]), "NCHW" ([N, D, H, W]) or "NHWC"
            ([N, H, W, D], of Swin). Exits that are not named are found; see below.
        elf_options: keyword arguments of `ELF`: thresholds, criterion, exit_loss, drop_exited, ...

    Shape: features at an exit are vectors [N, D], sequences or maps. Heads average over all
    dimensions but N and D. Which one is D follows from the layers that see the features, else from
    a run on a smaller input; where neither tells, `layout` must.

    Tracing runs the forward of the modules that contain an exit once, in Python. What it reads from
    attributes (a rate of dropout, a switch for gradient checkpointing) stays as it is now. What it
    derives from `training` follows the model's mode, not a flag that a single module gets later.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a name is unknown, repeated, out of order, or not called exactly once; more than
            one value crosses a cut; the forward cannot be traced, or differs between training and
            evaluation in more than numbers; features or logits have another shape than expected;
            the layout of features does not show; a module that contains an exit has hooks or a
            `train()` of its own, draws random numbers in Python, sets its attributes, or works
            under torch.no_grad(), autocast or gradient checkpointing; the stages give other logits
            or gradients than the backbone.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(),
        ...                     nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
        >>> x = torch.randn(4, 3, 8, 8)
        >>> model = from_backbone(net, ["1"], 10, example_input=x, thresholds=0.5)
        >>> model.eval()(x).logits.shape
        torch.Size([4, 10])
    """
    _check_example(example_input, num_classes)
    stages = split(backbone, exits)
    _, *features, logits = _run(backbone, stages, exits, example_input)
    _check_rows(logits, len(example_input))
    if logits.shape[1] != num_classes:
        raise ValueError(
            f"num_classes: expected {logits.shape[1]}, the classes of the backbone's logits, "
            f"got {num_classes}"
        )
    by_exit = dict(zip(exits, features, strict=True))
    _check_features(by_exit, len(example_input))
    _check_another_size(stages, exits, example_input)
    with _buffers_kept(backbone):
        found = layouts.find(backbone, by_exit, example_input, layout)
    heads: list[nn.Module] = [
        layouts.head(value, found[name], num_classes, conv=conv, name=name)
        for name, value in by_exit.items()
    ]
    model = ELF(stages, [*heads, nn.Identity()], **elf_options)
    left_out = set(map(id, undecayed(backbone).values()))
    model.undecayed = frozenset(
        name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in left_out
    )
    theirs = set(backbone.modules())
    for module in model.modules():
        if module not in theirs:
            module.training = backbone.training
    return model


def split(backbone: nn.Module, exits: Sequence[str]) -> list[nn.Module]:
    """The len(exits) + 1 stages of a network, cut after each named module. Run one after the other
    they compute what the network computes. Use it to build an `ELF` with heads of your own.

    Arguments, sharing and errors are those of `from_backbone`, without its checks on an example. A
    module that runs on both sides of a cut is in both stages. If the backbone has an in-place
    module right after a cut (`nn.ReLU(inplace=True)`), the stage overwrites its input;
    `from_backbone` makes it work on a copy instead.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> first, second = split(net, ["1"])
        >>> second.get_parameter("2.weight") is net[2].weight
        True
    """
    if not isinstance(backbone, nn.Module):
        raise TypeError(f"backbone: expected an nn.Module, got {checks.describe(backbone)}")
    exits = _check_names(backbone, exits)
    return list(cut(backbone, exits))


def _check_names(backbone: nn.Module, exits: Any) -> list[str]:
    if isinstance(exits, str) or not isinstance(exits, Sequence):
        raise TypeError(f"exits: expected a list of module names, got {checks.describe(exits)}")
    if not exits:
        raise ValueError("exits: expected at least one module name, got none")
    names = [name for name, _ in backbone.named_modules(remove_duplicate=False) if name]
    kind = type(backbone).__name__
    seen: dict[nn.Module, str] = {}
    for name in exits:
        if not isinstance(name, str):
            raise TypeError(f"exits: expected module names, got {checks.describe(name)}")
        if name not in names:
            near = difflib.get_close_matches(name, names)
            if near:
                hint = f"near names: {', '.join(near)}"
            else:
                hint = f"its children: {', '.join(dict(backbone.named_children())) or 'none'}"
            raise ValueError(f'exits: no module named "{name}" in {kind}; {hint}')
        module = backbone.get_submodule(name)
        if module in seen:
            raise ValueError(
                f'exits: expected different modules, got "{seen[module]}" and "{name}", '
                "which are the same"
            )
        seen[module] = name
    return list(exits)


def _check_rows(logits: Tensor, N: int) -> None:
    if logits.dim() != 2 or logits.shape[0] != N:
        raise ValueError(
            f"backbone: expected logits of shape [{N}, C], got {checks.describe(logits)}"
        )


def _check_features(features: Mapping[str, Tensor], N: int) -> None:
    for name, value in features.items():
        shape = value.shape
        fits = len(shape) in (2, 3, 4) and shape[0] == N and 0 not in shape
        if not (fits and value.is_floating_point()):
            raise ValueError(
                f'exits: expected "{name}" to return features [N, D], [N, T, D], [N, D, T], '
                f"[N, D, H, W] or [N, H, W, D] with N = {N}, got {checks.describe(value)}"
            )


def _check_example(example_input: Any, num_classes: Any) -> None:
    checks.tensor("example_input", example_input)
    if example_input.dim() < 1 or len(example_input) < 1:
        raise ValueError(
            "example_input: expected a batch [N, ...] with N >= 1, "
            f"got {checks.describe(example_input)}"
        )
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes: expected a positive integer, got {num_classes!r}")


def _run(
    backbone: nn.Module, stages: list[nn.Module], exits: Sequence[str], x: Tensor
) -> list[Tensor]:
    """[x, output of the first stage, ..., logits], in evaluation mode. Raises ValueError if the
    logits differ from the backbone's. A stage that writes into its input is changed to work on a
    copy, because the head before it may need these features for its gradient."""
    with _evaluation(backbone, x), torch.no_grad():
        try:
            expected = backbone(x.clone())
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f"example_input: expected a batch that the backbone takes, got "
                f"{checks.describe(x)}: {type(error).__name__}: {error}"
            ) from error
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
    _check_logits(values[-1], expected)
    _check_gradients(backbone, stages, x)
    _check_training(backbone, stages, x)
    return values


@contextlib.contextmanager
def _evaluation(network: nn.Module, x: Tensor) -> Iterator[None]:
    """Evaluation mode outside autocast and inference mode. Buffers keep their values."""
    # The heads take the dtype of the features as their own, and autocast would change it.
    outside_autocast = torch.autocast(x.device.type, enabled=False)
    with (
        mode(network, training=False),
        torch.inference_mode(False),
        outside_autocast,
        _buffers_kept(network),
    ):
        yield


@contextlib.contextmanager
def _buffers_kept(network: nn.Module) -> Iterator[None]:
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
        values = [x[torch.arange(n) % len(x)]]
        try:
            for stage in stages:
                values.append(stage(values[-1]))
        except Exception as error:  # a network that takes one size only
            if is_out_of_memory(error):
                raise
    features = values[1 : len(exits) + 1]
    _check_features(dict(zip(exits, features, strict=False)), n)
    if len(values) > len(stages):
        _check_rows(values[-1], n)


def _check_logits(logits: Tensor, expected: Tensor) -> None:
    if logits.shape != expected.shape or not _are_close(logits, expected):
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
    wrong = [name for name, ours, theirs in pairs if not _are_close(ours, theirs)]
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
    if any(isinstance(module, nn.SyncBatchNorm) for module in backbone.modules()):
        return True  # it would wait for other processes, which may not be here
    try:
        expected, found = _logits_in_training(backbone, x), _logits_in_training(chain, x)
        return _are_close(found, expected) or not _are_close(
            _logits_in_training(backbone, x), expected
        )
    except Exception:
        return True


@torch.enable_grad()
def _logits_in_training(network: nn.Module, x: Tensor) -> Tensor:
    """The logits of a copy. The global random generators keep their states."""
    states = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    outside_autocast = torch.autocast(x.device.type, enabled=False)
    try:
        with torch.random.fork_rng(devices), torch.inference_mode(False), outside_autocast:
            twin = copy.deepcopy(network)
            with mode(twin, training=True):
                return twin(x.clone())
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _are_close(ours: Tensor | None, theirs: Tensor | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    largest = theirs.float().abs().nan_to_num(0, 0, 0).amax().item() if theirs.numel() else 0.0
    return torch.allclose(
        ours.float(), theirs.float(), rtol=1e-2, atol=1e-2 * largest, equal_nan=True
    )
