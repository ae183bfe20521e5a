"""Data sets of image files and of images in memory, and the error for an unreadable file."""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin
from torch import Tensor
from torch.utils.data import Dataset

Transform = Callable[[Image.Image], Tensor]  # an RGB image to [3, H, W]

#: Formats that are not loaded, whatever a file is named: Pillow runs Ghostscript for EPS, and opens
#: what is inside an IPTC file, which may be EPS.
_UNSAFE = ("EPS", "IPTC")


class DecodeError(OSError):
    """An image file that cannot be read. The message and `path` name it.

    `path` has a default because pickling and torch's DataLoader rebuild an exception from its
    message alone.
    """

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.path = path


def read_image(path: str, *, exif_orientation: bool = True) -> Image.Image:
    """The file as an RGB image: the first frame of an animation, without transparency.

    Grey values of 12 and 16 bits are scaled to 8, and floating ones, which must be in [0, 1],
    multiplied by 255.

    Args:
        exif_orientation: turn and mirror the image as its EXIF orientation says. Pillow always does
            so for TIFF.

    Raises:
        DecodeError: the file is missing, cut short, damaged or no image, it is EPS or IPTC, it has
            more pixels than `PIL.Image.MAX_IMAGE_PIXELS`, or it has signed or 32-bit integers,
            whose range is not known.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's about metadata, one per image
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.format in _UNSAFE:
                    raise ValueError(f"expected an image of pixels, got {image.format}")
                image.load()
                if exif_orientation:
                    with contextlib.suppress(Exception):  # damaged metadata of a good image
                        ImageOps.exif_transpose(image, in_place=True)
                return _eight_bits(image).convert("RGB")
    # By format, damaged files raise OSError, SyntaxError, struct.error, zlib.error and others.
    except Exception as error:
        raise DecodeError(f"{path}: cannot be read as an image: {error!r}", path) from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image with 8 bits per channel; Pillow's own conversion clips larger values.

    Raises:
        ValueError: the range of its values is not known.
    """
    tags = getattr(image, "tag_v2", {})  # of TIFF
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
    is_signed = 2 in tags.get(TiffImagePlugin.SAMPLEFORMAT, ())
    # Pillow reads 16-bit PNG and PGM files as mode "I" or "I;16", by its version.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        white = 2**bits - 1
        values = (np.asarray(image).astype(np.uint32) * 255 + white // 2) // white
    elif image.mode == "I" or is_signed:
        kind = f"{'signed ' * is_signed}{bits}-bit integers"
        raise ValueError(f"expected unsigned values of up to 16 bits, got {kind}")
    elif image.mode == "F":
        values = np.asarray(image)
        if not bool(((values >= 0) & (values <= 1)).all()):
            low, high = values.min(), values.max()
            raise ValueError(f"expected floating values in [0, 1], got {low:g} to {high:g}")
        values = (values * 255).round()
    else:
        return image
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
        values = 255 - values  # 0 is white, which Pillow heeds up to 8 bits only
    return Image.fromarray(values.astype(np.uint8))


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Image files, each read when it is indexed. A file that cannot be read, or for which the
    transform raises ValueError, raises `DecodeError`.

    Args:
        root: the folder that holds the files, for `keys`.
        exif_orientation: see `read_image`.
    """

    def __init__(
        self,
        paths: Sequence[str],
        targets: Tensor,
        transform: Transform,
        *,
        root: str = "",
        exif_orientation: bool = True,
    ) -> None:
        self.paths = paths  # [N]
        self.targets = targets  # [N] int64
        self.transform = transform
        self.root = root
        self.exif_orientation = exif_orientation

    def __len__(self) -> int:
        return len(self.paths)

    def keys(self) -> list[bytes]:
        """[N] the files' names below root, which stay when the folder moves."""
        start = os.path.join(self.root, "")
        return [os.fsencode(path.removeprefix(start).replace(os.sep, "/")) for path in self.paths]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.paths[index]
        image = read_image(path, exif_orientation=self.exif_orientation)
        try:
            return self.transform(image), int(self.targets[index])
        except ValueError as error:
            raise DecodeError(f"{path}: {error}", path) from error


class ImageArray(Dataset[tuple[Tensor, int]]):
    """Images in memory."""

    def __init__(self, images: np.ndarray, targets: Tensor, transform: Transform) -> None:
        self.images = images  # [N, H, W, 3] uint8
        self.targets = targets  # [N] int64
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def keys(self) -> list[bytes]:
        """[N] digests of the images."""
        return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in self.images]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.targets[index])
