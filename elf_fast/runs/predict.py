"""Predictions of a loaded network on image files, image by image."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..base import apart_from, writable
from ..data import ImageLoader
from ..data.images import ImageFiles
from ..losses import LongTailLoss
from ..modes import mode
from ..modules import ELF

__all__ = ["Guess", "Prediction", "predict"]


class Guess(NamedTuple):
    """A class and its probability."""

    class_index: int
    class_name: str
    probability: float


class Prediction(NamedTuple):
    """What the network says about one image, at the exit that the image took."""

    path: str
    prediction: int  # index of the class
    class_name: str
    confidence: float  # probability of the class
    exit_index: int  # 0-based
    top: tuple[Guess, ...]  # the most probable classes, the prediction first
    exits: tuple[Guess, ...]  # [E] the most probable class at every exit; empty unless asked for


def predict(
    model: ELF,
    paths: Sequence[str | os.PathLike[str]],
    *,
    batch_size: int = 64,
    workers: int = 0,
    top_k: int = 1,
    exit_probabilities: bool = False,
    on_unreadable: Callable[[str], None] | None = None,
) -> Iterator[Prediction]:
    """Yields a prediction for every image file, in the order of `paths`, batch by batch.

    The probabilities are a softmax of the logits over the exit's temperature, so the confidence is
    that of the exit test with the criterion confidence. At the last exit, which tests nothing, the
    temperature is 1, or that of the model's loss (LDAM).

    Args:
        model: one that `elf_fast.load` returned, or with `transform` and `class_names` set. It is
            run in evaluation mode where it is.
        paths: image files; an image may come twice.
        workers: processes that load images; 0 loads in this one.
        top_k: how many classes `top` holds, at most all.
        exit_probabilities: also run the exits that an image does not reach, for `exits`. It costs
            as much again as a network without exits.
        on_unreadable: called with the message for every image that cannot be read, which is then
            left out. None: the first one raises.

    Raises:
        DecodeError: an image cannot be read, and on_unreadable is None.
        WorkerError: a process that loads images has ended.
        TypeError, ValueError: an argument is invalid.

    Example:
        >>> for found in predict(elf_fast.load("runs/photos"), ["cat.jpg", "dog.jpg"]):
        ...     print(found.path, found.class_name, found.confidence, found.exit_index)
    """
    _check(model, paths)
    checks.integer("batch_size", batch_size, 1, 2**20)
    checks.integer("workers", workers, 0, 1024)
    checks.integer("top_k", top_k, 1)
    names = [os.fspath(path) for path in paths]
    numbers = torch.arange(len(names))  # in place of targets: which image it is
    exif = model.transform.exif_orientation
    files = ImageFiles(names, numbers, model.transform, exif_orientation=exif)
    loader = ImageLoader(
        files,
        batch_size,
        workers=workers,
        skip_errors=on_unreadable is not None,
        named=on_unreadable,
    )
    k = min(top_k, len(model.class_names))
    return _predictions(model, names, loader, k, exit_probabilities)


def _check(model: ELF, paths: Sequence[str | os.PathLike[str]]) -> None:
    if not isinstance(model, ELF):
        raise TypeError(f"model: expected an elf_fast.ELF, got {checks.describe(model)}")
    if model.transform is None or not model.class_names:
        lacks = "transform" if model.transform is None else "class_names"
        raise ValueError(
            f"model: expected one with {lacks}, got None: elf_fast.save(..., {lacks}=...) records "
            f"it, or set model.{lacks}"
        )
    if isinstance(paths, str | bytes) or not isinstance(paths, Sequence):
        raise TypeError(f"paths: expected a list of files, got {checks.describe(paths)}")
    for path in paths:
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"paths: expected files, got {checks.describe(path)}")


def _predictions(
    model: ELF, paths: list[str], loader: ImageLoader, k: int, exit_probabilities: bool
) -> Iterator[Prediction]:
    classes = model.class_names
    like = next((p for p in model.parameters() if p.is_floating_point()), model.thresholds)
    scale = model.exit_loss.scale if isinstance(model.exit_loss, LongTailLoss) else 1.0
    last = model.temperatures.new_tensor([1 / scale])
    temperatures = torch.cat([model.temperatures, last])  # [E]
    if not paths:
        return
    for images, numbers in loader:
        with torch.inference_mode(), mode(model, training=False):
            images = images.to(like.device, like.dtype)
            out = model(images)
            z = out.logits.float() / temperatures[out.exit_index, None]
            order = z.sort(dim=1, descending=True, stable=True).indices[:, :k]  # ties: lowest class
            top = _guesses(classes, z.softmax(1).gather(1, order), order)
            exits = _at_every_exit(model, images, temperatures) if exit_probabilities else None
            at_exits = [()] * len(images) if exits is None else _guesses(classes, *exits)
        left = out.exit_index.tolist()
        for number, best, e, each in zip(numbers.tolist(), top, left, at_exits, strict=True):
            first = best[0]
            yield Prediction(
                paths[number], first.class_index, first.class_name, first.probability, e, best, each
            )


def _guesses(classes: Sequence[str], probability: Tensor, index: Tensor) -> list[tuple[Guess, ...]]:
    """A row of guesses for every image, of probabilities [n, k] of classes [n, k]."""
    rows = zip(probability.tolist(), index.tolist(), strict=True)
    return [tuple(Guess(c, classes[c], p) for p, c in zip(*row, strict=True)) for row in rows]


def _at_every_exit(model: ELF, images: Tensor, temperatures: Tensor) -> tuple[Tensor, Tensor]:
    """(probability, class) of the most probable class at every exit, each [n, E]."""
    found, x = [], images
    for e, (stage, head) in enumerate(zip(model.stages, model.heads, strict=True)):
        x = stage(writable(x)) if e else apart_from(images, stage(x))
        found.append((head(x).float() / temperatures[e]).softmax(1).max(1))
    best = torch.stack([v.values for v in found], 1), torch.stack([v.indices for v in found], 1)
    return best
