"""Milliseconds per image of a network with exits and of the whole network, measured here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import timing
from ..base import apart_from, writable
from ..modes import mode
from ..modules import ELF
from ..policy import Estimate


class Speed(NamedTuple):
    """Milliseconds per image; intervals are quartiles over the repetitions."""

    batch: int  # images that entered together
    stages: list[float]  # [E] median of stage and head, on a full batch
    whole: Estimate  # all stages and the last head
    exits: Estimate  # the network with its exits, on images of the data
    ratio: Estimate  # whole / exits
    where: str  # "cpu, 2 threads"

    def leaving(self, shares: list[float]) -> float:
        """Milliseconds per image if shares [E] of the images leave at each exit, as if a stage's
        time per image did not depend on how many images enter it."""
        reached = 1.0
        total = 0.0
        for ms, leaves in zip(self.stages, shares, strict=True):
            total += reached * ms
            reached -= leaves
        return total


@torch.no_grad()
def measure(model: ELF, images: Tensor, batch: int, *, seconds: float = 1.0) -> Speed:
    """Times the network on its device, as plain PyTorch with the kernels of the exits.

    Args:
        images: [n, ...] a random sample of the data, so that as many leave at each exit as do
            in all.
        batch: how many images enter together; fewer if there are fewer.

    Raises:
        ValueError: there are no images.
    """
    if not len(images):
        raise ValueError("images: expected at least one, got none")
    device = model.thresholds.device
    batches = [part.to(device) for part in images.split(batch)]
    batches = [part for part in batches if len(part) == len(batches[0])]
    size = len(batches[0])
    with mode(model, training=False):
        candidates: dict[str, Callable[[], Any]] = {
            "whole": partial(_each, partial(_whole, model), batches),
            "exits": partial(_each, model, batches),
        }
        x = batches[0]
        for e, (stage, head) in enumerate(zip(model.stages, model.heads, strict=True)):
            candidates[f"stage {e}"] = partial(_stage, stage, head, x)
            x = _stage(stage, head, x)
        samples = timing.sample(candidates, seconds=seconds)
    n = size * len(batches)
    threads = torch.get_num_threads()
    where = f"{device.type}, {threads} thread{'s' * (threads != 1)}"
    return Speed(
        size,
        [samples.time(f"stage {e}").median / 1e3 / size for e in range(len(model.stages))],
        _scaled(samples.time("whole"), 1e-3 / n),
        _scaled(samples.time("exits"), 1e-3 / n),
        _scaled(samples.ratio("whole", "exits"), 1),
        where if device.type == "cpu" else torch.cuda.get_device_name(device),
    )


def _scaled(q: timing.Quartiles, factor: float) -> Estimate:
    return Estimate(factor * q.median, factor * q.low, factor * q.high)


def _each(forward: Callable[[Tensor], Any], batches: list[Tensor]) -> None:
    for batch in batches:
        forward(batch)


def _whole(model: ELF, x: Tensor) -> Tensor:
    given = x
    for e, stage in enumerate(model.stages):
        x = stage(x) if e else apart_from(given, stage(x))
    return model.heads[-1](x).argmax(1)


def _stage(stage: nn.Module, head: nn.Module, x: Tensor) -> Tensor:
    """The features after a stage, whose head runs, too."""
    x = apart_from(x, stage(writable(x)))
    head(x)
    return x
