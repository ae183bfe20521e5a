"""What a sample costs that leaves at an exit: FLOPs, or milliseconds measured on this device.

Shapes: E exits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import checks, criteria, functional, reference, timing
from ..base import ELFBase, apart_from, writable
from ..flops import Flops
from ..modes import mode

_SECONDS = 2.0


def flops_shares(flops: Flops) -> list[float]:
    """[E] FLOPs of a sample that leaves at each exit, as shares of the network without exits."""
    return [flops.leaving_at(e) / flops.without_exits for e in range(len(flops.stages))]


@torch.no_grad()  # inference mode would make tensors in a module's cache useless for training
def milliseconds(model: ELFBase, batch: Tensor, *, seconds: float = _SECONDS) -> list[float]:
    """[E] milliseconds that a batch would take if all its samples left at each exit.

    Every stage, with its head and exit test, is timed on the whole batch and on half of it. From
    these its time is split into a part that every batch costs and a part per sample; so a mean over
    samples of these numbers is the time of a mixed batch, if at least one sample reaches the last
    stage. At a batch of one sample it is the mean latency.

    Args:
        batch: [N, ...] images on the device of the model.
        seconds: to spend on timing.

    Raises:
        TypeError, ValueError: no batch of at least one sample.
    """
    checks.example_input(batch)
    N = len(batch)
    calls: dict[str, Callable[[], Any]] = {}
    with mode(model, training=False):
        for n in {N, max(1, N // 2)}:
            x: Any = batch[:n]
            for e, (stage, head) in enumerate(zip(model.stages, model.heads, strict=True)):
                given = x
                x = stage(writable(x)) if e else apart_from(given, stage(given))
                calls[f"{n} {e}"] = _part(model, e, stage, head, given)
        samples = timing.sample(calls, seconds=seconds)
    fixed, growing = 0.0, []
    for e in range(len(model.stages)):
        whole = samples.time(f"{N} {e}").median / 1000
        if N == 1:
            growing.append(whole)
            continue
        half = samples.time(f"{N // 2} {e}").median / 1000
        per_sample = max(0.0, (whole - half) / (N - N // 2))
        growing.append(per_sample * N)
        fixed += whole - per_sample * N
    return [fixed + sum(growing[: e + 1]) for e in range(len(growing))]


def _part(model: ELFBase, e: int, stage: Any, head: Any, x: Tensor) -> Callable[[], Any]:
    """A call of stage e with its head and, unless it is the last, its test."""
    criterion = criteria.find(model.criterion)
    gate: Callable[..., Any] = functional.exit_gate
    if criterion.score is not None:
        gate = reference.exit_gate
    is_last = e == len(model.stages) - 1

    def call() -> Any:
        z = head(stage(writable(x)))
        return z if is_last else gate(z, criterion.off, criterion=model.criterion)

    return call
