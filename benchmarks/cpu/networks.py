"""Targets of whole networks: inference and training steps, by the share of samples that goes on
after each exit. A candidate with a wrong result is not timed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from elf_fast import ELF
from elf_fast.bench import inference, training
from elf_fast.bench.workload import inference_work, training_work

from .. import rivals
from ..inputs import LARGE, MIDDLE, SMALL, Network, build, folded
from ..row import Row
from .compare import Pair, compare


def inference_rows(*, full: bool) -> Iterator[Row]:
    batches = {SMALL: (1, 16, 64, 256), MIDDLE: (16, 64, 256)} if full else {SMALL: (16, 64)}
    batches |= {network: (64,) for network in LARGE} if full else {MIDDLE: (64,)}
    for network, sizes in batches.items():
        for N in sizes:
            model, images = build(network, N)
            model = folded(model)
            for share in (0.5, 0.8, 1.0) if N > 1 else (0.0, 1.0):
                yield from _inference(network, model, images, share, full)


def _inference(
    network: Network, model: ELF, images: Tensor, share: float, full: bool
) -> Iterator[Row]:
    N = len(images)
    work = inference_work(model, images, share)
    candidates = dict(inference.candidates(work))
    for name, rival in {
        "tuned PyTorch": rivals.tuned_torch(work),
        "padded": rivals.padded(work),
        "earlyon, batched": rivals.earlyon_batched(work),
        "earlyon, singly": rivals.earlyon_single(work),
    }.items():
        rivals.check(rival, work, exits=name != "earlyon, batched")
        candidates[name] = rival
    if N > 16:
        del candidates["earlyon, singly"]  # it takes N times as long as with N = 1
    asked = N >= 64 and network is not SMALL
    efficiency: Pair = ("elf_fast", "oracle", 0.97 if asked and share < 1 else None)
    whole: Pair = ("elf_fast", "full", 0.98 if asked and share == 1.0 else None)
    others: list[Pair] = [
        ("elf_fast", name, None)
        for name in candidates
        if name not in ("elf_fast", "oracle", "full")
    ]
    with torch.inference_mode():
        yield from compare(
            "inference", f"{network}, N = {N}, s = {share:g}", candidates,
            [efficiency, whole, *others], seconds=8 if full else 5,
        )  # fmt: skip


def training_rows(*, full: bool) -> Iterator[Row]:
    batches = {SMALL: (16, 32, 64, 128), MIDDLE: (16, 64, 128)} if full else {SMALL: (16, 64)}
    for network, sizes in batches.items():
        for N in sizes:
            for drop in (True, False):
                model, images = build(network, N)
                model.drop_exited = drop
                for share in (0.5, 1.0):
                    work = training_work(model, images, share)
                    least = None if not drop else 1.1 if network is SMALL and share < 1 else 1.0
                    faster = 1.0 if drop and share < 1 else None
                    yield from compare(
                        "training",
                        f"{network}, N = {N}, s = {share:g}, {'dropping' if drop else 'keeping'}",
                        training.candidates(work),
                        [("elf_fast", "reference", least), ("elf_fast", "full", faster),
                         ("elf_fast", "oracle", None), ("reference", "oracle", None)],
                        seconds=8 if full else 5,
                    )  # fmt: skip
