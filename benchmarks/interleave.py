"""Timing side by side: every repetition runs each candidate once, so that whatever else the
machine does falls on all of them; medians and quartiles over the repetitions."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import quantiles
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Microseconds a call."""

    median: float
    low: float  # first quartile
    high: float  # third quartile

    def __str__(self) -> str:
        return f"{self.median:.1f} ({self.low:.1f}..{self.high:.1f})"


def interleaved(
    candidates: Mapping[str, Callable[[], Any]], *, seconds: float = 1.0, burst: float = 200e-6
) -> dict[str, Timing]:
    """Times each candidate for about `seconds` / len(candidates) in all.

    A repetition calls a candidate often enough to last `burst` seconds, so that calls of a few
    microseconds are timed warm and the clock's own cost vanishes.
    """
    calls = {}
    for name, f in candidates.items():
        for _ in range(3):
            f()
        start = time.perf_counter()
        f()
        calls[name] = max(1, int(burst / max(time.perf_counter() - start, 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(next(iter(samples.values()))) < 5:
            for name, f in candidates.items():
                start = time.perf_counter()
                for _ in range(calls[name]):
                    f()
                samples[name].append((time.perf_counter() - start) / calls[name] * 1e6)
    finally:
        gc.enable()
    timings = {}
    for name, values in samples.items():
        low, median, high = quantiles(values, n=4)
        timings[name] = Timing(median, low, high)
    return timings
