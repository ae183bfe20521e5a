"""Early exits on any network: `from_backbone` cuts it at the outputs of named modules.

torch.fx traces only the modules that contain the named ones (their ancestors); every other module
is called as it is. Control flow inside a block (stochastic depth, attention) is therefore
untouched and still follows `train()` and `eval()`. The trace is cut into stages, each a
`torch.fx.GraphModule` that shares the backbone's submodules and parameters under their own names.

Shapes: N samples, C classes, D channels, E exits (exit E is the network's own classifier).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from . import checks, layouts
from .agreement import buffers_kept, features_and_logits
from .modules import ELF
from .stages import cut
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
    check_training: bool = True,
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
        check_training: compare gradients and logits in training mode with the backbone's, too.
            False saves most of the time, for a network that only predicts.
        elf_options: keyword arguments of `ELF`: thresholds, criterion, exit_loss, drop_exited, ...

    Shape: features at an exit are vectors [N, D], sequences or maps. Heads average over all
    dimensions but N and D. Which one is D follows from the layers that see the features, else from
    a run on a smaller input; where neither tells, `layout` must.

    Tracing runs the forward of the modules that contain an exit a few times, in Python. What it
    reads from attributes (a rate of dropout, a switch for gradient checkpointing) stays as it is
    now. What it derives from `training` follows the model's mode, not a flag that a single module
    gets later.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a name is unknown, repeated, out of order, or not called exactly once; more than
            one value crosses a cut; the forward cannot be traced, or differs between training and
            evaluation in more than numbers; features or logits have another shape than expected;
            the layout of features does not show; a module that contains an exit has hooks or a
            `train()` of its own, draws random numbers in Python, sets its attributes, or works
            under torch.no_grad(), autocast or gradient checkpointing; the stages give other logits
            or gradients than the backbone.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(),
        ...                     nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
        >>> x = torch.randn(4, 3, 8, 8)
        >>> model = from_backbone(net, ["1"], 10, example_input=x, thresholds=0.5)
        >>> model.eval()(x).logits.shape
        torch.Size([4, 10])
    """
    _check_example(example_input, num_classes)
    stages = split(backbone, exits)
    *features, logits = features_and_logits(
        backbone, stages, exits, example_input, in_training=check_training
    )
    if logits.shape[1] != num_classes:
        raise ValueError(
            f"num_classes: expected {logits.shape[1]}, the classes of the backbone's logits, "
            f"got {num_classes}; replace its classifier first, or create it with "
            f"num_classes={num_classes}"
        )
    by_exit = dict(zip(exits, features, strict=True))
    with buffers_kept(backbone):
        found = layouts.find(backbone, by_exit, example_input, layout)
    heads: list[nn.Module] = [
        layouts.head(value, found[name], num_classes, conv=conv, name=name)
        for name, value in by_exit.items()
    ]
    model = ELF(stages, [*heads, nn.Identity()], **elf_options)
    model.origin = {
        "network": "from_backbone",
        "class": f"{type(backbone).__module__}.{type(backbone).__qualname__}",
        "architecture": _timm_name(backbone),
        "build": {
            "exits": list(exits),
            "num_classes": num_classes,
            "input_shape": list(example_input.shape[1:]),
            "conv": conv,
            "layout": dict(layout) if isinstance(layout, Mapping) else layout,
        },
    }
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

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> first, second = split(net, ["1"])
        >>> second.get_parameter("2.weight") is net[2].weight
        True
    """
    if not isinstance(backbone, nn.Module):
        raise TypeError(f"backbone: expected an nn.Module, got {checks.describe(backbone)}")
    exits = _check_names(backbone, exits)
    return list(cut(backbone, exits))


def _timm_name(backbone: nn.Module) -> str | None:
    """The name under which timm made the network, if it did."""
    about = getattr(backbone, "pretrained_cfg", None)
    name = about.get("architecture") if isinstance(about, Mapping) else None
    return name if isinstance(name, str) else None


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


def _check_example(example_input: Any, num_classes: Any) -> None:
    checks.example_input(example_input)
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes: expected a positive integer, got {num_classes!r}")
