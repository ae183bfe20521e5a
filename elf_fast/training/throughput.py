"""Images per second of ELF on the fused operators, of its plain reference and of the network
without exits, timed side by side."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..bench.inference import check_agreement
from ..modules import ELF, unfuse

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
    `reference`, the model with its thresholds; `elf_fast_off` and `reference_off`, the same with
    its exits off, where early exit can only lose. They take turns inside every repetition, so that
    a busy machine slows all of them, and ratios are taken repetition by repetition.

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
        rates: dict[str, list[float]] = {name: [] for name in variants}
        variants["full"](batches[0])
        for _ in range(repeats):
            for name, forward in variants.items():
                start = time.perf_counter()
                for batch in batches:
                    forward(batch)
                rates[name].append(sum(map(len, batches)) / (time.perf_counter() - start))
        results.append(
            {
                "batch_size": len(batches[0]),
                "images_per_second": {name: _quartiles(v) for name, v in rates.items()},
                "ratios": {
                    f"{a}/{b}": _quartiles([x / y for x, y in zip(rates[a], rates[b], strict=True)])
                    for a, b in RATIOS
                },
            }
        )
    return results


def _batches(images: Tensor, batch_size: int, most: int = 8) -> list[Tensor]:
    """Up to `most` full batches of `images` in mixed order (one smaller batch if there is none):
    as they come they are sorted by class, and a class's images leave together."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    mixed = images[order]
    full = [b for b in mixed.split(batch_size) if len(b) == batch_size]
    return full[:most] or [mixed]


def _quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4)
