"""Evaluating a network on a part of its data set, fresh from training or from a file."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..data import DataError, ImageLoader, LabelledImages
from ..flops import Flops, count_flops
from ..losses import LongTailLoss
from ..metrics import ELFMetrics
from ..modes import mode
from ..modules import ELF
from ..samplers import EvaluationSampler
from . import build, checkpoint, demo, snapshot
from .checkpoint import CheckpointError
from .config import TrainConfig, from_dict

#: The key "network" in the metadata of a run's weights.
NETWORK = "elf-fast train"


def evaluation_loader(
    config: TrainConfig, part: LabelledImages, device: torch.device
) -> ImageLoader:
    """Batches of every sample once, shared out over the ranks."""
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


def sample(config: TrainConfig, device: torch.device) -> Tensor:
    """An image [1, 3, H, W] of zeros, for counting."""
    size = build.image_size(config)
    return torch.zeros(1, 3, size, size, device=device)


@torch.inference_mode()
def evaluate(
    config: TrainConfig, model: ELF, batches: ImageLoader, class_counts: list[int], flops: Flops
) -> dict[str, Any]:
    """The metrics (`ELFMetrics`) of the model over all ranks, and how many images were `skipped`.

    Raises:
        DataError: none of them can be read.
    """
    device = model.thresholds.device
    assert isinstance(model.exit_loss, LongTailLoss)
    temperatures = [*model.temperatures.tolist(), 1 / model.exit_loss.scale]
    metrics = ELFMetrics(class_counts, flops, temperatures=temperatures).to(device)
    with mode(model, training=False), autocast(config, device):
        for images, targets in batches:
            out = model(images.to(device, non_blocking=True))
            metrics.update(out, targets.to(device, non_blocking=True))
    found = metrics.compute()
    if not found["samples"]:
        raise nothing_readable(batches)
    return {**found, "skipped": len(batches.dataset) - found["samples"]}


def nothing_readable(batches: ImageLoader) -> DataError:
    N = len(batches.dataset)
    return DataError(f"expected an image that can be read, got none among {N} to evaluate on")


def evaluate_saved(path: Path, **overrides: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metadata, metrics) of a run, of one of its checkpoints, or of a checkpoint of the demo, on
    the test part, or on validation where a data set has no test part: metadata["part"] says which.

    Args:
        path: a run's or the demo's folder, a checkpoint of a run, or a file of weights.
        overrides: settings that differ from the run's, such as data_dir.

    Raises:
        CheckpointError: it cannot be read, or does not fit.
        ValueError, TypeError: its settings fit the data, this version or this machine no longer.
    """
    state, metadata = _read(path)
    if metadata.get("network") != NETWORK:
        metadata, metrics = demo.evaluate_checkpoint(
            path / snapshot.WEIGHTS if path.is_dir() else path
        )
        return {**metadata, "part": "test"}, metrics
    config = replace(from_dict(metadata["config"]), **overrides)
    splits = build.load_splits(config)
    if splits.class_counts != metadata["class_counts"]:
        raise CheckpointError(
            f"{path}: expected the training data that it was made with, class_counts "
            f"{metadata['class_counts']}, got {splits.class_counts}"
        )
    try:
        device = checks.device(config.device)
    except ValueError:  # of the machine that it was trained on
        device = checks.device(None)
    model = build.network(config, splits.class_counts)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: its weights do not fit the network of this version "
            f"({checkpoint.misfit(error)})"
        ) from error
    model.to(device)
    name = "validation" if splits.test is None else "test"
    part = getattr(splits, name)
    if part is None:
        raise CheckpointError(f"{path}: expected a test or validation part in its data, got none")
    flops = count_flops(model, sample(config, device))
    loader = evaluation_loader(config, part, device)
    metrics = evaluate(config, model, loader, splits.class_counts, flops)
    return {**metadata, "part": name}, metrics


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_dir():
        return checkpoint.load(path)
    if (path / snapshot.WEIGHTS).is_file() and not (path / snapshot.MANIFEST).is_file():
        return checkpoint.load(path / snapshot.WEIGHTS)
    if (path / snapshot.MANIFEST).is_file():
        found: snapshot.Snapshot | None = snapshot.load(path)
    else:
        found, refused = snapshot.newest(path / "checkpoints")
        if found is None:
            why = "; ".join(map(str, refused)) or "found none"
            raise CheckpointError(f"{path}: expected a run with weights or checkpoints: {why}")
    assert found is not None
    return found.weights if found.average is None else found.average, found.metadata
