"""How an image becomes the input of a network at evaluation, as data that a file can hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor, nn

from .. import checks
from .images import read_image

#: Means and standard deviations per channel, of pixels in [0, 1]. CIFAR_STD is the one of long-tail
#: papers on CIFAR-10 and CIFAR-100 (as in the code of Cao et al., arXiv 1906.07413): the mean over
#: images of the deviation inside an image, which is smaller than the deviation of all pixels.
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: The longest shape, as a ratio of sides, that is scaled as a whole before a crop. The centre crop
#: sees 7/8 of the shorter side.
LONGEST = 4

Fit = Literal["crop", "squash", "exact"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]


@dataclass(frozen=True)
class Preprocessing:
    """The evaluation transform: from an image to a float32 tensor [channels, size, size].

    Args:
        size: height and width of the network's input, in pixels.
        fit: "crop" scales the shorter side to `resize` and crops the centre; "squash" scales both
            sides to `size`; "exact" takes images of size x size pixels only.
        resize: pixels of the shorter side before the crop; None: 8/7 of `size`. Only for "crop".
        interpolation: how pixels are scaled, always with antialiasing.
        mean, std: per channel, of pixels in [0, 1]. One value each makes the image grey.
        exif_orientation: turn photos as the orientation in their EXIF data says; for `read`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> transform = Preprocessing(224, interpolation="bicubic")
        >>> transform(Image.new("RGB", (640, 480))).shape
        torch.Size([3, 224, 224])
    """

    size: int
    fit: Fit = "crop"
    resize: int | None = None
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    exif_orientation: bool = True

    def __post_init__(self) -> None:
        checks.integer("size", self.size, 1, 2**14)
        for name, value, known in (
            ("fit", self.fit, get_args(Fit)),
            ("interpolation", self.interpolation, get_args(Interpolation)),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
        if self.fit != "crop" and self.resize is not None:
            raise ValueError(f"resize: expected None with fit={self.fit!r}, got {self.resize!r}")
        if self.resize is not None:
            checks.integer("resize", self.resize, self.size, 2**15)
        for name in ("mean", "std"):
            numbers = tuple(getattr(self, name))
            for number in numbers:
                checks.at_least(name, number, -1e6 if name == "mean" else 1e-6, 1e6)
            object.__setattr__(self, name, tuple(map(float, numbers)))
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean):
            raise ValueError(
                "mean, std: expected 3 numbers each, or 1 each for grey images, got "
                f"{len(self.mean)} and {len(self.std)}"
            )
        if type(self.exif_orientation) is not bool:
            raise TypeError(
                f"exif_orientation: expected True or False, got {self.exif_orientation!r}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the tensor: channels, height and width."""
        return len(self.mean), self.size, self.size

    def __call__(self, image: Image.Image) -> Tensor:
        """An image of any mode -> float32 [channels, size, size].

        Raises:
            ValueError: fit is "exact" and the image has another size.
        """
        mode = "RGB" if len(self.mean) == 3 else "L"
        return self._transform(image if image.mode == mode else image.convert(mode))

    def read(self, path: str) -> Tensor:
        """The image in a file -> float32 [channels, size, size].

        Raises:
            DecodeError: see `read_image`.
            ValueError: as for a call.
        """
        return self(read_image(path, exif_orientation=self.exif_orientation))

    @cached_property
    def _transform(self) -> Callable[[Image.Image], Tensor]:
        from torchvision.transforms import v2

        mode = v2.InterpolationMode[self.interpolation.upper()]
        scale: list[Any]
        if self.fit == "crop":
            resize = self.resize or round(self.size * 8 / 7)
            scale = [_middle, v2.Resize(resize, mode), v2.CenterCrop(self.size)]
        elif self.fit == "squash":
            scale = [v2.Resize((self.size, self.size), mode)]
        else:
            scale = [Exactly(self.size)]
        return v2.Compose([*scale, *normalise(self.mean, self.std)])

    @classmethod
    def from_torchvision(cls, preset: Any) -> Preprocessing:
        """The preprocessing of torchvision's pretrained weights, `weights.transforms()`.

        Raises:
            TypeError: it is no preset for classification.
            ValueError: it crops more than it scales to.
        """
        names = ("crop_size", "resize_size", "interpolation", "mean", "std")
        if not all(hasattr(preset, name) for name in names):
            raise TypeError(
                "preset: expected the transforms() of torchvision's weights for classification, "
                f"got {checks.describe(preset)}"
            )
        return cls(
            _one("crop_size", preset.crop_size),
            resize=_one("resize_size", preset.resize_size),
            interpolation=preset.interpolation.value,
            mean=tuple(preset.mean),
            std=tuple(preset.std),
        )

    @classmethod
    def from_timm(cls, config: Mapping[str, Any]) -> Preprocessing:
        """The evaluation transform of timm's network, from
        `timm.data.resolve_model_data_config(model)`.

        Raises:
            TypeError: it is no dict with these entries.
            ValueError: an image that is not square, or another crop_mode than "center", or
                "squash" with a crop_pct of 1.
        """
        names = ("input_size", "interpolation", "mean", "std", "crop_pct")
        if not isinstance(config, Mapping) or not set(names) <= set(config):
            raise TypeError(
                "config: expected what timm.data.resolve_model_data_config(model) returns, got "
                f"{checks.describe(config)}"
            )
        size = _one("input_size", config["input_size"][1:])
        pct, mode = config["crop_pct"] or 0.875, config.get("crop_mode") or "center"
        if mode not in ("center", "squash") or (mode == "squash" and pct != 1):
            raise ValueError(
                "crop_mode: expected 'center', or 'squash' with a crop_pct of 1, got "
                f"{mode!r} and {pct}"
            )
        return cls(
            size,
            "squash" if mode == "squash" else "crop",
            resize=None if mode == "squash" else math.floor(size / pct),
            interpolation=config["interpolation"],
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
        )

    @classmethod
    def of(cls, transform: Any) -> Preprocessing:
        """A preprocessing as it is, one from a preset of torchvision, or from a config of timm.

        Raises:
            TypeError, ValueError: it is none of these.
        """
        if isinstance(transform, Preprocessing):
            return transform
        if isinstance(transform, Mapping):
            return cls.from_timm(transform)
        if hasattr(transform, "crop_size"):
            return cls.from_torchvision(transform)
        raise TypeError(
            "transform: expected a data.Preprocessing, the transforms() of torchvision's weights, "
            f"or timm's data config, got {checks.describe(transform)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON can hold them."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """What `to_dict` gave.

        Raises:
            TypeError, ValueError: an entry is missing, unknown or out of range.
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or set(values) != known:
            found = sorted(map(str, values)) if isinstance(values, Mapping) else values
            raise ValueError(f"preprocessing: expected the entries {sorted(known)}, got {found}")
        for name in ("mean", "std"):
            if not isinstance(values[name], list | tuple):
                raise TypeError(f"{name}: expected a list of numbers, got {values[name]!r}")
        return cls(**values)


def _one(name: str, sizes: Any) -> int:
    """The only size of a square: torchvision gives [n], [n, n] or n, timm (n, n)."""
    several = sizes if isinstance(sizes, list | tuple) else (sizes,)
    if len(set(several)) != 1:
        raise ValueError(f"{name}: expected one size, for a square, got {sizes!r}")
    return int(several[0])


class Exactly:
    """Returns an image of size x size pixels as it is; raises ValueError for another size."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        if image.size != (self.size, self.size):
            raise ValueError(
                f"expected an image of {self.size}x{self.size} pixels, got "
                f"{image.width}x{image.height}; only image_transforms (trained with --transforms "
                "large) take images of any size"
            )
        return image


def _middle(image: Image.Image) -> Image.Image:
    """The middle of an image that is more than `LONGEST` times as long as wide, and other images as
    they are. An image of 2 x 20,000 pixels, scaled as a whole, would need gigabytes."""
    short, long = sorted(image.size)
    rest = (long - LONGEST * short) // 2  # pixels cut at each end; the centre stays
    if rest <= 0:
        return image
    width, height = image.size
    x, y = (rest, 0) if width == long else (0, rest)
    return image.crop((x, y, width - x, height - y))


def normalise(mean: tuple[float, ...], std: tuple[float, ...]) -> list[nn.Module]:
    """The steps from an image to a normalised float32 tensor."""
    from torchvision.transforms import v2

    return [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(mean), list(std)),
    ]
