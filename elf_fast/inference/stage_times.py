"""How long each stage takes for n samples: measured at a few n, linear in between."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import checks

__all__ = ["Stages", "Times", "interpolated", "measure_stages", "scheduler_times"]

#: Milliseconds of each stage by number of samples: {n: [E]}.
Times = Mapping[int, Sequence[float]]

#: Runs of each stage at each batch size, of which the quickest one counts. Fewer, but two, if they
#: take longer than SECONDS.
RUNS, SECONDS = 5, 0.1


class Stages(Protocol):
    """What `Engine` offers to callers that make up the batches themselves."""

    max_batch: int

    @property
    def stages(self) -> int: ...

    def stage_input(self, e: int, n: int) -> Tensor: ...

    def run_stage(self, e: int, x: Tensor) -> Any: ...


def measure_stages(engine: Stages, max_batch: int) -> dict[int, list[float]]:
    """Milliseconds of each stage and its exit, for batches of 1 to `max_batch` samples."""
    sizes = sorted({n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n < max_batch} | {max_batch})
    return {n: [_milliseconds(engine, e, n) for e in range(engine.stages)] for n in sizes}


def _milliseconds(engine: Stages, e: int, n: int) -> float:
    taken: list[float] = []
    while len(taken) < 2 or (len(taken) < RUNS and sum(taken) < SECONDS):
        x = engine.stage_input(e, n)
        with torch.inference_mode():
            x.zero_()
        start = time.perf_counter()
        engine.run_stage(e, x)
        taken.append(time.perf_counter() - start)
    return 1e3 * min(taken)


def interpolated(times: Times, max_batch: int) -> list[list[float]]:
    """[E][max_batch + 1] seconds of each stage for 0 to `max_batch` samples. No samples take no
    time; from the largest n of the table on, time grows as between the last two."""
    sizes = sorted(times)
    result = []
    for e in range(len(times[sizes[0]])):
        ms = [times[n][e] for n in sizes]
        result.append([0.0] + [_at(n, sizes, ms) / 1e3 for n in range(1, max_batch + 1)])
    return result


def _at(n: int, sizes: Sequence[int], ms: Sequence[float]) -> float:
    if len(sizes) == 1:
        return ms[0] * n / sizes[0]
    i = min(max(bisect_left(sizes, n), 1), len(sizes) - 1)
    slope = (ms[i] - ms[i - 1]) / (sizes[i] - sizes[i - 1])
    return max(ms[i - 1] + slope * (n - sizes[i - 1]), 0.0)


def scheduler_times(given: Times | None, engine: Stages, max_batch: int) -> list[list[float]]:
    """`interpolated` times that a user gave, or those of `measure_stages`."""
    if given is None:
        return interpolated(measure_stages(engine, max_batch), max_batch)
    if not isinstance(given, Mapping) or not given:
        raise TypeError(
            f"stage_times: expected a mapping from n to milliseconds of each stage, "
            f"got {checks.describe(given)}"
        )
    for n, row in given.items():
        checks.integer("stage_times", n, 1)
        if len(row) != engine.stages:
            raise ValueError(
                f"stage_times: expected {engine.stages} milliseconds for n = {n}, one per stage, "
                f"got {len(row)}"
            )
        for ms in row:
            checks.at_least("stage_times", ms, 0)
    return interpolated(given, max_batch)
