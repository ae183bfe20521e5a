"""Mixup and CutMix: batches of mixed images, and the loss for their two labels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..losses import LongTailLoss
from ..modules import ELF
from ..runs.config import TrainConfig


class Mixed(NamedTuple):
    """A batch whose images are each mixed from two."""

    images: Tensor  # [N, 3, H, W]
    targets: Tensor  # [N] int64, of the image that holds the larger share
    others: Tensor  # [N] int64, of the other one
    share: Tensor  # [N] float32, of the first, in [0.5, 1]


class MixedLoss(nn.Module):
    """share * loss(z, targets) + (1 - share) * loss(z, others), per sample, for logits z [N, C] of
    the whole batch (Zhang et al., arXiv 1710.09412; Yun et al., arXiv 1905.04899)."""

    def __init__(self, loss: LongTailLoss, batch: Mixed) -> None:
        super().__init__()
        self.loss, self.others, self.share = loss, batch.others, batch.share

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        if len(logits) != len(self.others):  # a sample has left, so the rows are others
            raise ValueError(f"logits: expected {len(self.others)} samples, got {len(logits)}")
        first, second = self._losses(logits, targets), self._losses(logits, self.others)
        return torch.lerp(second, first, self.share)

    def _losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        reduction = self.loss.reduction
        self.loss.reduction = "none"
        try:
            return self.loss(logits, targets)
        finally:
            self.loss.reduction = reduction


class Mixer:
    """Mixes every batch by mixup or CutMix of torchvision; with both, by one of them at random."""

    def __init__(self, config: TrainConfig) -> None:
        from torchvision.transforms import v2

        kinds = ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix))
        chosen = [kind(alpha=alpha) for kind, alpha in kinds if alpha]
        self._mix = v2.RandomChoice(chosen)

    def __call__(self, images: Tensor, targets: Tensor) -> Mixed:
        # Every image is a class of its own here, so the mixed labels are the images' shares.
        mixed, shares = self._mix(images, torch.eye(len(images), device=images.device))
        partners = targets.roll(1)  # as torchvision pairs the images
        share = shares.diagonal()
        is_first = share >= 0.5
        return Mixed(
            mixed,
            torch.where(is_first, targets, partners),
            torch.where(is_first, partners, targets),
            torch.where(is_first, share, 1 - share),
        )


@contextlib.contextmanager
def mixed_loss(model: ELF, batch: Mixed) -> Iterator[None]:
    """The model's loss is the one of a mixed batch inside the context. No sample may leave."""
    loss = model.exit_loss
    assert isinstance(loss, LongTailLoss)
    model.exit_loss = MixedLoss(loss, batch)
    try:
        yield
    finally:
        model.exit_loss = loss
