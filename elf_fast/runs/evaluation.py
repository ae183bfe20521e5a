"""Evaluating a network on a loader, during a run and afterwards by `elf-fast eval`."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data import DataError, ImageLoader, LabelledImages
from ..flops import Flops
from ..losses import LongTailLoss
from ..modes import mode
from ..modules import ELF
from ..samplers import EvaluationSampler
from .config import TrainConfig

if TYPE_CHECKING:
    from ..metrics import ELFMetrics


def evaluation_loader(
    config: TrainConfig, part: LabelledImages, device: torch.device
) -> ImageLoader:
    """Batches that hold every sample once, divided among the processes."""
    return ImageLoader(
        part,
        config.batch_size,
        sampler=EvaluationSampler(len(part)),
        workers=config.workers,
        channels_last=config.channels_last,
        pin_memory=device.type == "cuda",
        skip_errors=config.skip_errors,
    )


def autocast(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager:
    """The mixed precision of a run."""
    return torch.autocast(device.type, getattr(torch, config.amp_dtype), enabled=config.amp)


@torch.no_grad()  # inference mode would make tensors in a module's cache useless for training
def evaluate(
    config: TrainConfig, model: ELF, batches: ImageLoader, class_counts: list[int], flops: Flops
) -> dict[str, Any]:
    """The metrics (`ELFMetrics`) of the model over all processes, and how many images were
    `skipped`.

    Raises:
        DataError: more than half of the images cannot be read.
    """
    device = model.thresholds.device
    metrics = run_metrics(model, class_counts, flops)
    with mode(model, training=False), autocast(config, device):
        for images, targets in batches:
            out = model(images.to(device, non_blocking=True))
            metrics.update(out, targets.to(device, non_blocking=True))
    found = metrics.compute()
    check_read(batches, found["samples"])
    return {**found, "skipped": len(batches.dataset) - found["samples"]}


def run_metrics(
    model: ELF, class_counts: list[int], flops: Flops, prior: Tensor | None = None
) -> ELFMetrics:
    """The metrics of a run's network, at the temperatures of its exits and of its loss."""
    from ..metrics import ELFMetrics  # here, because torchmetrics imports matplotlib

    assert isinstance(model.exit_loss, LongTailLoss)
    temperatures = [*model.temperatures.tolist(), 1 / model.exit_loss.scale]
    metrics = ELFMetrics(class_counts, flops, temperatures=temperatures, prior=prior)
    return metrics.to(model.thresholds.device)


def check_read(batches: ImageLoader, read: int) -> None:
    """Raises DataError if more than half of the images to evaluate on cannot be read; `read`: how
    many all processes together have read."""
    check_readable("evaluation", read, len(batches.dataset), batches.skipped)


def check_readable(what: str, read: int, N: int, unreadable: Collection[str]) -> None:
    """Raises DataError if less than half of N images were read. unreadable: names of others."""
    if 2 * read < N:
        example = f", such as {min(unreadable)}" if unreadable else ""
        raise DataError(
            f"{what}: expected at least half of {N:,} images to be readable, got {read:,}; the "
            f"others cannot be read{example}"
        )
