"""Data sets of image files and of images in memory, and the error for an unreadable file."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

Transform = Callable[[Image.Image], Tensor]  # an RGB image to [3, H, W]


class DecodeError(OSError):
    """An image file that cannot be read. The message and `path` name it.

    `path` has a default because pickling and torch's DataLoader rebuild an exception from its
    message alone.
    """

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.path = path


def read_image(path: str) -> Image.Image:
    """The file as an RGB image.

    Raises:
        DecodeError: the file is missing, cut short, damaged or no image.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    # By format, damaged files raise OSError, SyntaxError, struct.error, zlib.error and others.
    except Exception as error:
        raise DecodeError(f"{path}: cannot be read as an image: {error!r}", path) from error


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Image files, each read when it is indexed. A file that cannot be read, or for which the
    transform raises ValueError, raises `DecodeError`."""

    def __init__(self, paths: Sequence[str], targets: Tensor, transform: Transform) -> None:
        self.paths = paths  # [N]
        self.targets = targets  # [N] int64
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.paths[index]
        image = read_image(path)
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

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.targets[index])
