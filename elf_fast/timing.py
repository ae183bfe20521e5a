"""Timing side by side: every repetition times each candidate once, so that other load on the
machine affects all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import quantiles
from typing import Any, NamedTuple

import torch


class Quartiles(NamedTuple):
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        low, median, high = quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


class Samples(dict[str, list[float]]):
    """Microseconds per call: one number per repetition for every candidate."""

    def time(self, name: str) -> Quartiles:
        """Microseconds per call."""
        return Quartiles.of(self[name])

    def ratio(self, of: str, to: str) -> Quartiles:
        """Time of candidate `of` divided by the time of `to` in the same repetition."""
        return Quartiles.of([a / b for a, b in zip(self[of], self[to], strict=True)])


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def sample(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 1.0,
    burst: float = 200e-6,
    least: int = 5,
    pause: float = 0.0,
) -> Samples:
    """Runs all candidates in turn for about `seconds` in all, for at least `least` repetitions.

    A repetition calls a candidate often enough to last `burst` seconds, so that calls of a few
    microseconds run with warm caches and the cost of reading the clock is negligible. The time
    includes the GPU work that a candidate started.

    pause: seconds of sleep before each candidate, in which threads of the one before stop spinning.
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
                if pause:
                    time.sleep(pause)
                start = time.perf_counter()
                for _ in range(calls[name]):
                    f()
                _wait()
                samples[name].append((time.perf_counter() - start) / calls[name] * 1e6)
    finally:
        gc.enable()
    return samples
