"""What every loading function returns: the parts of a data set and its classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .. import checks


class DataError(ValueError):
    """A data set on disk is incomplete or invalid; the message has one line per finding."""


class LabelledImages(Protocol):
    """A map-style data set whose targets are known without loading an image."""

    @property
    def targets(self) -> Tensor: ...  # [N] int64

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]: ...  # image [D, H, W], target


@dataclass(frozen=True)
class Splits:
    """The parts of a data set; None for a part that it does not have."""

    train: LabelledImages
    validation: LabelledImages | None
    test: LabelledImages | None
    class_names: list[str]  # [C]
    left_out: str = ""  # what was found beside the images and not read, in words

    @property
    def class_counts(self) -> list[int]:
        """[C] training samples of every class."""
        counts = torch.bincount(self.train.targets, minlength=len(self.class_names))
        return counts.tolist()

    def summary(self) -> str:
        """What was found and what was left out, in one line."""
        text = f"data: {len(self.class_names):,} classes, images: {len(self.train):,} to train on"
        for part, use in ((self.validation, "validation"), (self.test, "test")):
            text += f", no {use} part" if part is None else f", {len(part):,} in the {use} part"
        text += f"; left out: {self.left_out}" if self.left_out else ""
        return checks.printable(text)  # a file name may hold any bytes
