"""Which dimension of an exit's features holds the channels, and the head that fits.

The shape alone does not say it: [N, 24, 24, 24] can be [N, D, H, W] or [N, H, W, D]. `find` asks
the layers of the network, then runs the network on a smaller input, and refuses if neither tells.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import batchnorm, pooling
from torch.nn.modules import conv as convolution

from . import checks
from .heads import ExitHead
from .modes import mode

__all__ = ["LAYOUTS", "find", "head"]

#: By name: how many dimensions features have, and which of them holds the channels.
LAYOUTS = {"NCL": (3, 1), "NLC": (3, 2), "NCHW": (4, 1), "NHWC": (4, 3)}
_VECTORS = "NC"


def head(features: Tensor, layout: str, num_classes: int, *, conv: bool, name: str) -> ExitHead:
    """An exit's classifier for features like these. `name` is the exit's, for messages.

    Raises:
        ValueError: `conv` and no map [N, D, H, W].
    """
    if conv and layout != "NCHW":
        note = " (read as [N, H, W, D])" if layout == "NHWC" else ""
        raise ValueError(
            f'conv: expected features [N, D, H, W], got {list(features.shape)}{note} from "{name}"'
        )
    made = ExitHead(features.shape[layout.index("C")], num_classes, conv=conv)
    if layout == "NHWC":
        made.stem = nn.Flatten(1, 2)  # tokens [N, H * W, D]
    elif layout == "NCL":
        made.stem = nn.Unflatten(2, (-1, 1))  # a map [N, D, L, 1]
    return made.to(features.device, features.dtype)


def find(
    backbone: nn.Module,
    features: Mapping[str, Tensor],
    x: Tensor,
    given: str | Mapping[str, str] | None,
) -> dict[str, str]:
    """The layout of the features of every exit: a key of LAYOUTS, or "NC" for vectors.

    Args:
        backbone: runs on two samples, in evaluation mode.
        features: by name of the exit, what it returns for x, [N, ...] with 2 to 4 dimensions.
        x: [N, ...].
        given: layouts that the user names, as in `models.from_backbone`.

    Raises:
        TypeError, ValueError: `given` names no layout, another exit, or one that does not fit.
        ValueError: the layout of an exit is not given, and nothing in the network shows it.
    """
    found = _given(features, given)
    found |= {name: _VECTORS for name, value in features.items() if value.dim() == 2}
    open_ = {name: value[:2] for name, value in features.items() if name not in found}
    if open_:
        run = _Run({}, [])
        _observe(backbone, open_, x[:2], run)  # two, as norms over the batch need
        axes = {name: _channels_by_layers(run, name) for name in open_}
        if None in axes.values():
            smaller = _channels_by_size(backbone, run, x[:2])
            for name in [name for name, axis in axes.items() if axis is None]:
                axis = smaller[name]
                axes[name] = _channels_by_readers(run, name) if axis is None else axis
        for name, axis in axes.items():
            found[name] = _layout(name, features[name], axis)
    return found


def _given(features: Mapping[str, Tensor], given: Any) -> dict[str, str]:
    if given is None:
        return {}
    if isinstance(given, str):
        given = dict.fromkeys(features, given)
    if not isinstance(given, Mapping):
        raise TypeError(
            f"layout: expected one of {', '.join(LAYOUTS)}, a dict from exits to them, or None, "
            f"got {checks.describe(given)}"
        )
    for name, layout in given.items():
        if name not in features:
            raise ValueError(f"layout: expected names of exits, {list(features)}, got {name!r}")
        shape = list(features[name].shape)
        fitting = [known for known, (dims, _) in LAYOUTS.items() if dims == len(shape)]
        if layout not in fitting:
            raise ValueError(
                f"layout: expected {' or '.join(fitting) or 'none'} for features {shape} from "
                f'"{name}", got {layout!r}'
            )
    return dict(given)


def _layout(name: str, value: Tensor, axis: int | None) -> str:
    for layout, fits in LAYOUTS.items():
        if fits == (value.dim(), axis):
            return layout
    fitting = [known for known, (dims, _) in LAYOUTS.items() if dims == value.dim()]
    raise ValueError(
        f'layout: expected {" or ".join(fitting)} for "{name}", because nothing in the network '
        f"shows which dimension of its features {list(value.shape)} holds the channels, got None"
    )


class _Run(NamedTuple):
    outputs: dict[str, Tensor]  # what each exit returns
    seen: list[tuple[Tensor, int]]  # tensors of layers with channels, and the channels' dimension


def _observe(
    backbone: nn.Module, exits: Sequence[str] | Mapping[str, Any], x: Tensor, run: _Run
) -> None:
    """Runs the backbone on x and notes what exits return and what layers with channels see."""

    def at_exit(name: str, module: nn.Module, args: Any, output: Any) -> None:
        run.outputs[name] = output

    def at_layer(module: nn.Module, args: Any, output: Any) -> None:
        axis, taken, returned = _channels(module)
        for tensor, channels in ((args[0] if args else None, taken), (output, returned)):
            if isinstance(tensor, Tensor) and tensor.dim() in (3, 4) and channels is not None:
                where = _axis(module, tensor, axis, channels)
                if where is not None:
                    run.seen.append((tensor, where))

    hooks = [
        module.register_forward_hook(at_layer)
        for module in backbone.modules()
        if isinstance(module, _LAYERS)
    ]
    hooks += [
        backbone.get_submodule(name).register_forward_hook(functools.partial(at_exit, name))
        for name in exits
    ]
    try:
        outside_autocast = torch.autocast(x.device.type, enabled=False)
        with mode(backbone, training=False), torch.no_grad(), outside_autocast:
            backbone(x.clone())
    finally:
        for hook in hooks:
            hook.remove()


_CONVOLUTIONS = (convolution._ConvNd,)
_NORMS_OF_MAPS = (batchnorm._NormBase, nn.GroupNorm)
_NORMS_OF_TOKENS = (nn.LayerNorm, nn.RMSNorm)
_TRANSFORMERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
_POOLS = (
    pooling._AvgPoolNd,
    pooling._MaxPoolNd,
    pooling._AdaptiveAvgPoolNd,
    pooling._AdaptiveMaxPoolNd,
)
_LAYERS = (*_CONVOLUTIONS, *_NORMS_OF_MAPS, *_POOLS, *_NORMS_OF_TOKENS, *_TRANSFORMERS, nn.Linear,
           nn.RNNBase, nn.Embedding)  # fmt: skip


def _channels(module: Any) -> tuple[int, int | None, int | None]:
    """(dimension of the channels, their number in the input, their number in the output). 0 stands
    for a number that the layer does not know, None for a tensor that says nothing."""
    if isinstance(module, _CONVOLUTIONS):
        return 1, module.in_channels, module.out_channels
    if isinstance(module, _NORMS_OF_MAPS):
        D = module.num_channels if isinstance(module, nn.GroupNorm) else module.num_features
        return 1, D, D
    if isinstance(module, _POOLS):
        return 1, 0, 0
    if isinstance(module, _NORMS_OF_TOKENS):
        D, *more = module.normalized_shape
        return (-1, None, None) if more else (-1, D, D)
    if isinstance(module, _TRANSFORMERS):
        attention: Any = getattr(module, "self_attn", module)
        return -1, attention.embed_dim, attention.embed_dim
    if isinstance(module, nn.Linear):
        return -1, module.in_features, module.out_features
    if isinstance(module, nn.RNNBase):
        return -1, module.input_size, None  # it returns a tuple
    return -1, None, module.embedding_dim  # nn.Embedding


def _axis(module: nn.Module, tensor: Tensor, axis: int, channels: int) -> int | None:
    """The dimension of a tensor [N, ...] that holds the channels, if the layer shows it."""
    last = tensor.dim() - 1
    is_torchs = type(module).__module__.startswith("torch.nn.")
    if channels == 0:
        spatial = int(type(module).__name__[-2:-1]) if is_torchs else None  # AvgPool2d -> 2
        return axis if spatial == tensor.dim() - 2 else None
    if is_torchs:
        axis = last if axis == -1 else axis
        return axis if tensor.shape[axis] == channels else None
    # A subclass can work on another layout, such as LayerNorm2d of timm and torchvision.
    fitting = [a for a in (1, last) if tensor.shape[a] == channels]
    return fitting[0] if len(fitting) == 1 else None


def _channels_by_layers(run: _Run, name: str) -> int | None:
    """The channels' dimension according to the layers that see a tensor of this shape. None if they
    differ, as one of them may mix over positions. None if none sees this very tensor and another
    dimension has the same size, as a transposed tensor could have the same shape."""
    features = run.outputs[name]
    alike = {axis for tensor, axis in run.seen if tensor.shape[1:] == features.shape[1:]}
    if len(alike) != 1:
        return None
    axis = alike.pop()
    is_seen = any(tensor is features for tensor, _ in run.seen)
    return axis if is_seen or _is_alone(features, axis) else None


def _channels_by_readers(run: _Run, name: str) -> int | None:
    """The channels' dimension according to the layers that see this very tensor. Others, which
    differ, must have seen a transposed one: another dimension has the same size."""
    features = run.outputs[name]
    same = {axis for tensor, axis in run.seen if tensor is features}
    axis = same.pop() if len(same) == 1 else None
    return None if axis is None or _is_alone(features, axis) else axis


def _is_alone(features: Tensor, axis: int) -> bool:
    """Whether no other dimension has the size of this one."""
    return list(features.shape[1:]).count(features.shape[axis]) == 1


def _channels_by_size(backbone: nn.Module, run: _Run, x: Tensor) -> dict[str, int | None]:
    """By exit, the dimension that keeps its size when a dimension of the input is halved."""
    changed: dict[str, set[int]] = {name: set() for name in run.outputs}
    for dim in range(1, x.dim()):
        half = x.narrow(dim, 0, x.shape[dim] // 2)
        smaller = _Run({}, [])
        # A network can refuse another size in any way. What exits returned before counts.
        with contextlib.suppress(Exception):
            if half.numel():
                _observe(backbone, list(run.outputs), half, smaller)
        for name, value in smaller.outputs.items():
            before = run.outputs[name].shape
            if isinstance(value, Tensor) and value.dim() == len(before):
                changed[name] |= {d for d in range(1, value.dim()) if value.shape[d] != before[d]}
    axes: dict[str, int | None] = {}
    for name, dims in changed.items():
        kept = {1, run.outputs[name].dim() - 1} - dims
        axes[name] = kept.pop() if dims and len(kept) == 1 else None
    return axes
