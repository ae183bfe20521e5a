"""Evaluates an opened network for a page."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..data import ImageLoader, Preprocessing
from ..runs.evaluation import check_read, run_metrics
from ..runs.observation import observe
from ..runs.opening import Evaluation
from . import speed
from .evaluated import SHOWN, Evaluated

#: At least as many images are timed, if there are as many.
_TIMED = 256


def evaluate(
    name: str,
    opened: Evaluation,
    *,
    prior: list[float] | None = None,
    batch: int | None = None,
    seconds: float = 1.0,
) -> Evaluated:
    """Evaluates, and runs every image through all exits, too.

    Args:
        name: how the page calls it.
        prior: [C] weights of the classes.
        batch: also times batches of so many images, for at least so many seconds.

    Raises:
        DataError: more than half of the images cannot be read.
    """
    model, images = opened.model, opened.images
    weights = None if prior is None else torch.tensor(prior, dtype=torch.float64)
    metrics = run_metrics(model, opened.class_counts, opened.flops, weights)
    generator = torch.Generator().manual_seed(0)
    most = 0 if batch is None else max(batch, _TIMED)
    chosen = torch.randperm(len(images), generator=generator)[:most].tolist()
    with opened.precision():
        observed = observe(model, opened.batches, metrics, wrong=SHOWN, images=set(chosen))
    files = getattr(images, "paths", None)
    if isinstance(opened.batches, ImageLoader):
        read = observed.metrics["samples"]
        check_read(opened.batches, read)
        observed.metrics["skipped"] = len(images) - read
        skipped = opened.batches.skipped
        files = None if files is None else [path for path in files if path not in skipped]
    transform = getattr(images, "transform", None)
    if not isinstance(transform, Preprocessing):  # digits, whose pixels are in [-1, 1]
        transform = Preprocessing(images[0][0].shape[-1], "exact", mean=(0.5,), std=(0.5,))
    found = Evaluated(
        name=name,
        part=opened.part,
        class_names=opened.class_names,
        class_counts=opened.class_counts,
        flops=opened.flops,
        thresholds=model.thresholds.cpu(),
        observed=observed,
        mean=transform.mean,
        std=transform.std,
        files=files,
        prior=weights,
        speed=None,
    )
    if batch is None or not len(observed.images):
        return found
    # The data may be sorted by class, and images of one class tend to leave together.
    mixed = observed.images[torch.randperm(len(observed.images), generator=generator)]
    settings = [setting.thresholds for setting in found.timed]
    with opened.precision():
        return replace(found, speed=speed.measure(model, mixed, batch, settings, seconds=seconds))
