"""Which batch to run next: decides when samples that wait for a stage should wait for more.

Let m samples wait for stage d, and n for an earlier stage u, j of which are expected to reach d.
t_e(n) is the time of stage e for n samples, t_u here the time from u up to d, and R the number of
samples that wait behind these m + n. Running d(m), u(n), d(j) and running u(n), d(m + j) do the
same work, and the second takes S = t_d(m) + t_d(j) - t_d(m + j) less. The second lets all samples
leave earlier by, added up,

    gain = (j + R) S                          those that meet the m at d, and those behind
         - m (t_u + t_d(m + j) - t_d(m))      those that are held

The m are held while gain > 0. With a long queue S decides: refilling pays where a larger batch is
cheaper per sample. With a short queue, or where time is linear in n (S = 0), the m run at once.
What the n - j that leave in between would gain is not counted: most of their requests wait for
others of the n. When it was counted, refilling lost at low load (benchmarks/serving_simulation.py).
Predicting whether a rebatching pays is the idea of DREX (arXiv 2512.15705).

If only the first stage has samples, m of them, the next request is waited for if that makes the m
and the r samples of that request leave earlier in all, counted in the same way. An engine that is
not busy enough to collect a queue therefore runs what there is at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

__all__ = ["Choice", "Refill", "Waiting"]


class Waiting(Protocol):
    """Samples that wait for one stage."""

    def __len__(self) -> int: ...

    @property
    def oldest(self) -> float: ...  # seconds on the clock at which the first one came here

    def earliest_deadline(self) -> float: ...


class Choice(NamedTuple):
    stage: int | None  # None: nothing to run now
    wake: float = math.inf  # when to ask again, in seconds on the clock


class Refill:
    """Chooses the stage to run. Deepest first, unless holding its samples pays."""

    #: A share of survivors is that of about so many samples.
    MEMORY = 1024
    #: A rate is that of about so many requests.
    REQUESTS = 16

    def __init__(
        self, seconds: Sequence[Sequence[float]], max_batch: int, max_wait: float, *, refill: bool
    ) -> None:
        """seconds[e][n]: time of stage e for n <= max_batch samples. max_wait: seconds that a batch
        which is not full may be held. refill: False holds nothing."""
        self._seconds = seconds
        self._max_batch = max_batch
        self._max_wait = max_wait
        self._refill = refill
        #: Expected share of samples that go on after each stage.
        self.shares = [0.5] * (len(seconds) - 1) + [0.0]
        self._seen = [2] * len(seconds)  # samples, with two before the first
        self._last_arrival = -math.inf
        self._arrivals = 0
        self._gap = 0.0  # mean seconds between requests
        self._size = 1.0  # mean samples per request

    def arrived(self, now: float, size: int) -> None:
        """Takes note of a request."""
        gap = now - self._last_arrival if self._arrivals else 0.0
        self._last_arrival = max(now, self._last_arrival)
        weight = 1 / min(max(self._arrivals, 1), self.REQUESTS)
        self._gap += weight * (max(gap, 0.0) - self._gap)
        self._size += weight * (size - self._size)
        self._arrivals += 1

    def left(self, e: int, n: int, survivors: int) -> None:
        """Takes note of how many of n samples went on after stage e."""
        self._seen[e] += n
        weight = min(n / min(self._seen[e], self.MEMORY), 1.0)
        self.shares[e] += weight * (survivors / n - self.shares[e])

    def choose(self, queues: Sequence[Waiting], now: float, *, closing: bool = False) -> Choice:
        """The stage to run. closing: no request will come."""
        busy = [e for e in range(len(queues) - 1, -1, -1) if len(queues[e])]
        for i, d in enumerate(busy):
            if not self._may_hold(queues[d], now):
                return Choice(d)
            if i + 1 < len(busy):
                if not self._pays(queues, d, busy[i + 1], now):
                    return Choice(d)
            elif d or i or closing or not self._pays_to_wait(len(queues[d]), queues[d], now):
                return Choice(d)
        if not busy:
            return Choice(None)
        wake = min(queues[0].oldest + self._max_wait, now + max(self._expected_gap(now), 1e-4))
        return Choice(None, wake)

    def _may_hold(self, queue: Waiting, now: float) -> bool:
        overdue = now >= queue.oldest + self._max_wait
        return self._refill and len(queue) < self._max_batch and not overdue

    def _time(self, e: int, n: float) -> float:
        return self._seconds[e][min(max(round(n), 0), self._max_batch)]

    def _pays(self, queues: Sequence[Waiting], d: int, u: int, now: float) -> bool:
        """Whether to hold the samples of stage d until stage u has run."""
        m, n = len(queues[d]), min(len(queues[u]), self._max_batch)
        j, t_u = float(n), 0.0
        for e in range(u, d):
            t_u += self._time(e, j)
            j *= self.shares[e]
        behind = sum(map(len, queues)) - m - n
        t_m, met = self._time(d, m), min(j, self._max_batch - m)
        t_both = self._time(d, m + met)
        deadline = queues[d].earliest_deadline()
        if now + t_m <= deadline < now + t_u + t_both:
            return False
        saved = t_m + self._time(d, met) - t_both
        return (met + behind) * saved > m * (t_u + t_both - t_m)

    def _pays_to_wait(self, m: int, queue: Waiting, now: float) -> bool:
        """Whether m samples of the first stage wait for the next request, r samples."""
        if self._arrivals <= self.REQUESTS:
            return False  # too few to know a rate
        gap = self._expected_gap(now)
        t_m, r = self._through(m), min(self._size, self._max_batch - m)
        t_both = self._through(m + r)
        if gap >= t_m or now + t_m <= queue.earliest_deadline() < now + gap + t_both:
            return False
        apart = m * t_m + r * (t_m - gap + self._through(r))
        return m * (gap + t_both) + r * t_both < apart

    def _expected_gap(self, now: float) -> float:
        """Seconds until the next request."""
        return max(self._gap, now - self._last_arrival)

    def _through(self, n: float) -> float:
        """Expected seconds of n samples through all stages."""
        seconds = 0.0
        for e, share in enumerate(self.shares):
            seconds += self._time(e, n)
            n *= share
        return seconds
