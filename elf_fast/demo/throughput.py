"""Images per second of ELF on the fused operators, of its plain reference and of the network
without exits, timed side by side."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import timing
from ..bench.inference import check_agreement
from ..modules import ELF, unfuse
from ..timing import Quartiles

RATIOS = (("elf_fast", "full"), ("elf_fast", "reference"), ("elf_fast_off", "full"))


@torch.inference_mode()
def measure(
    model: ELF,
    without_exits: ELF,
    images: Tensor,
    *,
    batch_sizes: tuple[int, ...] = (256, 16),
    repeats: int = 11,
) -> list[dict[str, Any]]:
    """One entry per batch size, {"batch_size", "images_per_second", "ratios"}, every figure as
    [lower quartile, median, upper quartile] over the repetitions.

    The variants: `full`, the network without exits as a plain nn.Sequential; `elf_fast` and
    `reference`, the model with its thresholds; `elf_fast_off` and `reference_off`, the model with
    its exits off, where exits only add cost. Every repetition times all of them, so that a busy
    machine slows all of them, and ratios are computed within a repetition.

    Raises:
        RuntimeError: elf_fast and the reference disagree (`check_agreement`).
    """
    fast = model.eval()
    off = copy.deepcopy(fast)
    off.thresholds.fill_(math.inf)
    full = nn.Sequential(*without_exits.eval().stages, *without_exits.heads)
    variants: dict[str, Callable[[Tensor], Any]] = {
        "full": lambda x: full(x).argmax(1),
        "reference": unfuse(fast),
        "elf_fast": fast,
        "reference_off": unfuse(off),
        "elf_fast_off": off,
    }
    results = []
    for batch_size in batch_sizes:
        batches = _batches(images, batch_size)
        for batch in batches:
            for suffix, m in (("", fast), ("_off", off)):
                ours, theirs = (
                    variants[name + suffix](batch) for name in ("elf_fast", "reference")
                )
                check_agreement(ours, theirs, m.thresholds)
        samples = timing.sample(
            {name: partial(_run, forward, batches) for name, forward in variants.items()},
            seconds=0,
            least=repeats,
        )
        size = sum(map(len, batches))
        results.append(
            {
                "batch_size": len(batches[0]),
                "images_per_second": {
                    name: _rising(Quartiles.of([size / us * 1e6 for us in samples[name]]))
                    for name in variants
                },
                "ratios": {f"{a}/{b}": _rising(samples.ratio(b, a)) for a, b in RATIOS},
            }
        )
    return results


def _run(forward: Callable[[Tensor], Any], batches: list[Tensor]) -> None:
    for batch in batches:
        forward(batch)


def _batches(images: Tensor, batch_size: int, most: int = 8) -> list[Tensor]:
    """Up to `most` full batches of shuffled `images`, or one smaller batch if they fill none. The
    data set is sorted by class, and images of one class tend to leave together."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    mixed = images[order]
    full = [b for b in mixed.split(batch_size) if len(b) == batch_size]
    return full[:most] or [mixed]


def _rising(q: Quartiles) -> list[float]:
    return [q.low, q.median, q.high]
