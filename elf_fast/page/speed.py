"""Milliseconds per image of a network with exits and of the whole network, measured here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import timing
from ..base import apart_from
from ..modes import mode
from ..modules import ELF
from ..policy import Estimate

#: Repetitions, and calls beside them that `timing.sample` makes to warm up.
_LEAST, _WARM_UP = 5, 4
_SECONDS = 30.0  # about how long the measurement of large networks takes


class Speed(NamedTuple):
    """Milliseconds per image; intervals are quartiles over the repetitions."""

    batch: int  # images that entered together
    images: int  # that were timed
    whole: Estimate  # all stages and the last head
    exits: Estimate  # the network with its exits
    ratio: Estimate  # whole / exits, within a repetition
    settings: list[float]  # medians at other thresholds
    where: str  # "cpu, 2 threads"


@torch.no_grad()
def measure(
    model: ELF, images: Tensor, batch: int, settings: Sequence[Tensor] = (), *, seconds: float = 1.0
) -> Speed:
    """Times the network on its device, as plain PyTorch with the kernels of the exits.

    Args:
        images: [n, ...] a random sample of the data, so that as many leave at each exit as do
            in all. A large network is timed on fewer batches of them.
        batch: how many images enter together; fewer if there are fewer.
        settings: other thresholds, like the model's, to be timed, too.
        seconds: how long, at least.

    Raises:
        ValueError: there are no images.
    """
    if not len(images):
        raise ValueError("images: expected at least one, got none")
    device = model.thresholds.device
    batches = [part.to(device) for part in images.split(batch)]
    batches = [part for part in batches if len(part) == len(batches[0])]
    own = model.thresholds.clone()
    with mode(model, training=False):
        start = time.perf_counter()
        _whole(model, batches[0])
        once = (time.perf_counter() - start) * (len(settings) + 2) * (_LEAST + _WARM_UP)
        batches = batches[: max(1, int(_SECONDS / max(once, 1e-9)))]
        candidates: dict[str, Callable[[], Any]] = {
            "whole": partial(_each, partial(_whole, model), batches),
            "exits": partial(_at, model, own, batches),
        }
        for i, thresholds in enumerate(settings):
            candidates[str(i)] = partial(_at, model, thresholds.to(own), batches)
        try:
            samples = timing.sample(candidates, seconds=seconds, least=_LEAST)
        finally:
            model.thresholds.copy_(own)
    n = sum(map(len, batches))
    threads = torch.get_num_threads()
    where = f"{device.type}, {threads} thread{'s' * (threads != 1)}"
    return Speed(
        len(batches[0]),
        n,
        _scaled(samples.time("whole"), 1e-3 / n),
        _scaled(samples.time("exits"), 1e-3 / n),
        _scaled(samples.ratio("whole", "exits"), 1),
        [samples.time(str(i)).median * 1e-3 / n for i in range(len(settings))],
        torch.cuda.get_device_name(device) if device.type == "cuda" else where,
    )


def _scaled(q: timing.Quartiles, factor: float) -> Estimate:
    return Estimate(factor * q.median, factor * q.low, factor * q.high)


def _each(forward: Callable[[Tensor], Any], batches: list[Tensor]) -> None:
    for batch in batches:
        forward(batch)


def _at(model: ELF, thresholds: Tensor, batches: list[Tensor]) -> None:
    model.thresholds.copy_(thresholds)
    _each(model, batches)


def _whole(model: ELF, x: Tensor) -> Tensor:
    given = x
    for e, stage in enumerate(model.stages):
        x = stage(x) if e else apart_from(given, stage(x))
    return model.heads[-1](x).argmax(1)
