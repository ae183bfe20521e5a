"""Timing side by side: every repetition runs each candidate once, so that whatever else the
machine does falls on all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: median and quartiles over the repetitions."""

    median: float
    low: float  # first quartile
    high: float  # third quartile

    def __str__(self) -> str:
        return f"{self.median:.1f} ({self.low:.1f}..{self.high:.1f})"


class Samples(dict[str, list[float]]):
    """Microseconds a call of every candidate, repetition by repetition."""

    def timing(self, name: str) -> Timing:
        low, middle, high = quantiles(self[name], n=4)
        return Timing(middle, low, high)

    def ratio(self, of: str, to: str) -> Timing:
        """Time of one candidate over that of another in the same repetition."""
        low, middle, high = quantiles([a / b for a, b in zip(self[of], self[to], strict=True)], n=4)
        return Timing(middle, low, high)


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def sample(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 1.0,
    burst: float = 200e-6,
    least: int = 5,
) -> Samples:
    """Runs all candidates in turn for about `seconds` in all, at least `least` times each.

    A repetition calls a candidate often enough to last `burst` seconds, so that calls of a few
    microseconds are timed warm and the clock's own cost vanishes. Work that a candidate leaves to
    the GPU is waited for.
    """
    calls = {}
    for name, f in candidates.items():
        for _ in range(3):
            f()
        _wait()
        start = time.perf_counter()
        f()
        _wait()
        calls[name] = max(1, int(burst / max(time.perf_counter() - start, 1e-9)))
    samples = Samples({name: [] for name in candidates})
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(next(iter(samples.values()))) < least:
            for name, f in candidates.items():
                start = time.perf_counter()
                for _ in range(calls[name]):
                    f()
                _wait()
                samples[name].append((time.perf_counter() - start) / calls[name] * 1e6)
    finally:
        gc.enable()
    return samples


def interleaved(
    candidates: Mapping[str, Callable[[], Any]], *, seconds: float = 1.0, burst: float = 200e-6
) -> dict[str, Timing]:
    """The timing of each candidate; see `sample`."""
    samples = sample(candidates, seconds=seconds, burst=burst)
    return {name: samples.timing(name) for name in samples}
