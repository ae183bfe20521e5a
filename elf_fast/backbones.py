"""Networks by name (timm's, torchvision's and the CIFAR ResNets of the long-tail papers), their
pretrained weights, and how deep in a network each part lies."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

__all__ = ["CifarResNet", "Statistics", "create", "create_pretrained", "default_exits", "depths",
           "find", "statistics"]  # fmt: skip

#: Attributes in which networks of timm and torchvision hold their stages or blocks: numbered ones
#: (layer1 in ResNet, s1 in timm's RegNet), or one container.
_NUMBERED = ("layer", "stage", "s", "level")
_CONTAINERS = ("stages", "blocks", "trunk_output", "encoder.layers", "layers", "features")
_NO_STEPS = (
    f"has no layer1, layer2, ... (nor {', '.join(_NUMBERED[1:])} with numbers) and none of "
    f"{', '.join(_CONTAINERS)}"
)


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters. The shortcut takes every s-th pixel
    at stride s and pads new channels with zeros (option A of He et al., arXiv 1512.03385).
    [N, in, H, W] -> [N, out, H/s, W/s]."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            before = self.new_channels // 2
            x = F.pad(x, (0, 0, 0, 0, before, self.new_channels - before))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 for 32x32 images: 3 groups of n blocks of 16, 32 and 64 channels
    (He et al., arXiv 1512.03385, section 4.2), `layer1` to `layer3`.

    Shape: [N, 3, 32, 32] -> [N, num_classes].

    Raises:
        ValueError: depth is no 6n + 2.
    """

    def __init__(self, depth: int = 32, num_classes: int = 10) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth: expected 6n + 2 with n >= 1 (20, 32, 44, ...), got {depth}")
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(_Block(16, 16, 1) for _ in range(n)))
        self.layer2 = nn.Sequential(
            *(_Block(16 if i == 0 else 32, 32, 1 + (i == 0)) for i in range(n))
        )
        self.layer3 = nn.Sequential(
            *(_Block(32 if i == 0 else 64, 64, 1 + (i == 0)) for i in range(n))
        )
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def create(name: str, num_classes: int, **options: Any) -> nn.Module:
    """An untrained network with `num_classes` outputs.

    Args:
        name: "cifar_resnet32" (any depth 6n + 2), "timm/NAME", "torchvision/NAME", or a bare NAME,
            looked up in timm first, then in torchvision.
        options: keyword arguments of the network, such as timm's `drop_path_rate`.

    Raises:
        ValueError: no network has this name; the message lists similar names.
        ModuleNotFoundError: the library that "timm/" or "torchvision/" names is not installed.
    """
    library, bare = _find(name)
    if not library:
        return CifarResNet(int(bare.removeprefix("cifar_resnet")), num_classes, **options)
    if library == "timm":
        import timm

        return timm.create_model(bare, num_classes=num_classes, **options)
    from torchvision.models import get_model

    return get_model(bare, num_classes=num_classes, **options)


def create_pretrained(name: str, **options: Any) -> nn.Module:
    """A network as its library published it: with pretrained weights and the classes of these. The
    library downloads weights that are not in its cache.

    Raises:
        ValueError, ModuleNotFoundError: as `create`; or there are no published weights.
    """
    library, bare = _find(name)
    statistics(name)
    if library == "timm":
        import timm

        return timm.create_model(bare, pretrained=True, **options)
    from torchvision.models import get_model

    return get_model(bare, weights="DEFAULT", **options)


class Statistics(NamedTuple):
    """How the images were prepared on which published weights were trained."""

    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]
    interpolation: str  # nearest, bilinear, bicubic or lanczos


def statistics(name: str) -> Statistics:
    """What the library says about the pretrained weights of a network. Nothing is downloaded.

    Raises:
        ValueError, ModuleNotFoundError: as `create_pretrained`.
    """
    library, bare = _find(name)
    if library == "timm":
        from timm.models import get_pretrained_cfg

        config = get_pretrained_cfg(bare)
        if config is not None and config.has_weights:
            known = config.interpolation in ("nearest", "bilinear", "bicubic", "lanczos")
            scaled = config.interpolation if known else "bilinear"  # "random" in some
            return Statistics(tuple(config.mean), tuple(config.std), scaled)
    elif library == "torchvision":
        from torchvision.models import get_model_weights

        for weights in list(get_model_weights(bare))[-1:]:
            given = getattr(type(weights), "DEFAULT", weights).transforms()
            scaled = given.interpolation.value
            return Statistics(tuple(given.mean), tuple(given.std), scaled)
    raise ValueError(
        f"name: expected a network with pretrained weights in timm or torchvision, got {name!r}"
    )


def _find(name: str) -> tuple[str, str]:
    """(library, name there); the library is "timm", "torchvision" or, of a CifarResNet, ""."""
    if name.startswith("cifar_resnet") and name.removeprefix("cifar_resnet").isdigit():
        return "", name
    library, _, bare = name.rpartition("/")
    known: list[str] = []
    if library == "timm" or (not library and importlib.util.find_spec("timm")):
        import timm

        if timm.is_model(bare):
            return "timm", bare
        known += timm.list_models()
    if library == "torchvision" or (not library and importlib.util.find_spec("torchvision")):
        from torchvision.models import list_models

        theirs = list_models()
        if bare in theirs:
            return "torchvision", bare
        known += theirs
    near = difflib.get_close_matches(bare, [*dict.fromkeys(known), "cifar_resnet32"], n=5)
    raise ValueError(
        "name: expected a network of timm or torchvision, or cifar_resnet32, "
        f"got {name!r}{f'; near names: {near}' if near else ''}"
    )


def find(
    made_by: str, architecture: str | None, num_classes: int, tensors: Mapping[str, Size]
) -> str | None:
    """The name under which `create` makes a network that has these tensors, or None.

    Args:
        made_by: the network's class, as "module.Class".
        architecture: the name that timm gave it, if timm made it.
        tensors: shapes of its parameters and buffers by name; a network with more of them fits, if
            none has fewer.
    """
    if architecture is not None:
        return f"timm/{architecture}"
    names: list[str] = []
    if made_by == f"{CifarResNet.__module__}.{CifarResNet.__qualname__}":
        names = [f"cifar_resnet{depth}" for depth in range(8, 117, 6)]
    elif made_by.startswith("torchvision.models.") and importlib.util.find_spec("torchvision"):
        from torchvision import models

        module = made_by.rpartition(".")[0]
        builders = {name: models.get_model_builder(name) for name in models.list_models()}
        names = [f"torchvision/{n}" for n, make in builders.items() if make.__module__ == module]
    more = {}  # tensors that it has beside these
    for name in names:
        with torch.device("meta"):
            shapes = {n: value.shape for n, value in create(name, num_classes).state_dict().items()}
        if all(shapes.get(n) == shape for n, shape in tensors.items()):
            more[name] = len(shapes) - len(tensors)
            if not more[name]:
                break
    return min(more, key=more.__getitem__, default=None)


def default_exits(backbone: nn.Module) -> list[str]:
    """Names for `from_backbone`: the ends of the first three quarters of the network's stages or
    blocks (with three stages, the first two).

    Raises:
        ValueError: the network's stages or blocks have none of the usual names.
    """
    steps = _steps([name for name, _ in backbone.named_modules()])
    n = len(steps)
    if n < 2:
        raise ValueError(
            f"exits: {type(backbone).__name__} {_NO_STEPS}; name the modules after which to put "
            "exits"
        )
    ends = sorted({max(1, n * quarter // 4) for quarter in (1, 2, 3)}) if n > 3 else range(1, n)
    return [steps[end - 1] for end in ends]


def depths(names: Sequence[str]) -> dict[str, int]:
    """By name, how deep each parameter of a network lies: 0 before the first stage or block, k in
    the k-th of n, and n + 1 behind the last.

    Args:
        names: of all parameters, in the order of `named_parameters`.

    Raises:
        ValueError: the network's stages or blocks have none of the usual names.
    """
    steps = _steps(names)
    if not steps:
        raise ValueError(f"layer_decay: the network {_NO_STEPS}")
    found, behind = {}, False
    for name in names:
        depth = next((k for k, step in enumerate(steps, 1) if name.startswith(f"{step}.")), 0)
        behind = behind or depth > 0
        found[name] = depth or (len(steps) + 1) * behind
    return found


def _steps(names: Sequence[str]) -> list[str]:
    """The network's stages or blocks in their order, from the names of its modules or parameters;
    none if they have no usual names."""
    for prefix in _NUMBERED:
        steps = [f"{prefix}{i}" for i in range(1, 9)]
        if found := [s for s in steps if any(f"{name}.".startswith(f"{s}.") for name in names)]:
            return found
    for container in _CONTAINERS:
        inside = [n.removeprefix(f"{container}.") for n in names if n.startswith(f"{container}.")]
        if inside:
            return [f"{container}.{c}" for c in dict.fromkeys(n.split(".")[0] for n in inside)]
    return []
