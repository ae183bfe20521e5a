"""What a scheduler counts."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from .request import OUTCOMES

__all__ = ["BOUNDS", "Counters", "Histogram"]

#: Upper bounds of the latencies that are counted together, in milliseconds; a factor of 1.25 apart.
BOUNDS = tuple(0.1 * 1.25**i for i in range(62))


class Histogram:
    """Latencies by range."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.total_ms = 0.0

    def add(self, ms: float, n: int = 1) -> None:
        self.counts[bisect_left(BOUNDS, ms)] += n
        self.total_ms += n * ms

    def quantile(self, q: float) -> float:
        """Milliseconds that a share q does not exceed, to within a quarter."""
        rest = q * sum(self.counts)
        for bound, n in zip(BOUNDS, self.counts, strict=False):
            rest -= n
            if rest <= 0:
                return bound
        return BOUNDS[-1]

    def summary(self) -> dict[str, Any]:
        """Histogram: (upper bound in milliseconds, samples) of every range."""
        n = sum(self.counts)
        return {
            "samples": n,
            "mean_ms": self.total_ms / max(n, 1),
            "p50_ms": self.quantile(0.5) if n else 0.0,
            "p99_ms": self.quantile(0.99) if n else 0.0,
            "histogram": list(zip((*BOUNDS, math.inf), self.counts, strict=True)),
        }


class Counters:
    """E stages; batches of at most `max_batch` samples."""

    def __init__(self, stages: int, max_batch: int) -> None:
        self._max_batch = max_batch
        self.runs = [0] * stages
        self.samples = [0] * stages
        self.seconds = [0.0] * stages
        self.refilled = [0] * stages  # batches of samples that came to the stage at several times
        self.latency = [Histogram() for _ in range(stages)]  # of samples, by exit
        self.accepted = 0  # requests, likewise the next two
        self.refused = 0
        self.outcomes = dict.fromkeys(OUTCOMES, 0)

    def ran(self, e: int, n: int, seconds: float, *, refilled: bool) -> None:
        self.runs[e] += 1
        self.samples[e] += n
        self.seconds[e] += seconds
        self.refilled[e] += refilled

    def as_dict(self, waiting: Sequence[int]) -> dict[str, Any]:
        """See `SchedulerCore.stats`. waiting: samples in each queue."""
        stages = [
            {
                "waiting": waiting[e],
                "runs": self.runs[e],
                "refilled": self.refilled[e],
                "samples": self.samples[e],
                "fill": self.samples[e] / max(self.runs[e] * self._max_batch, 1),
                "busy_ms": 1e3 * self.seconds[e],
            }
            for e in range(len(self.runs))
        ]
        requests = {"accepted": self.accepted, "refused": self.refused, **self.outcomes}
        return {
            "requests": requests,
            "stages": stages,
            "exits": [latency.summary() for latency in self.latency],
        }
