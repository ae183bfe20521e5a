"""What every loading function returns: the parts of a data set and its classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


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

    @property
    def class_counts(self) -> list[int]:
        """[C] training samples of every class."""
        counts = torch.bincount(self.train.targets, minlength=len(self.class_names))
        return counts.tolist()
