"""Chooses the code of each part for each batch size, by times measured on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..timing import sample
from .code import Code
from .parts import Example, example_rows
from .report import StageReport

__all__ = ["Times", "choose", "measure", "sizes_to_time"]

#: Of one part: milliseconds by batch size and name of the code.
Times = dict[int, dict[str, float]]

#: Seconds in which the codes of one part are timed at one batch size. At least three runs each.
SECONDS = 0.4


def sizes_to_time(max_batch: int, buckets: Sequence[int]) -> list[int]:
    return sorted({n for n in (1, 4, 16, 64, *buckets, max_batch) if n <= max_batch})


def measure(codes: Sequence[Code], example: Example, n: int) -> dict[str, float]:
    """Median milliseconds of each code that takes n samples, timed in turns."""
    x = example_rows(example.x, n)
    fit = {code.name: code.run for code in codes if code.batch in (None, n)}
    with torch.inference_mode():
        times = sample({name: _call(run, x) for name, run in fit.items()}, seconds=SECONDS, least=3)
    return {name: times.time(name).median / 1e3 for name in fit}


def _call(run: Callable[[Tensor], Any], x: Tensor) -> Callable[[], Any]:
    return lambda: run(x)


def choose(
    stage: int, codes: Mapping[str, int | None], times: Times, max_batch: int
) -> tuple[list[str], list[StageReport]]:
    """The name of the code for every n of 0..max_batch: the fastest one at the nearest batch size
    (by ratio; the larger of two) that was timed.

    Args:
        codes: the only batch size that each code takes, by name. None: it takes any; there is at
            least one such code.
        times: of these codes and perhaps others. Without times the last code that fits serves.
    """
    anyone = [name for name, batch in codes.items() if batch is None]
    table, rows = [anyone[-1]], list[StageReport]()
    for n in range(1, max_batch + 1):
        usable = [name for name, batch in codes.items() if batch in (None, n)]
        near = min(times, key=lambda m: (max(m, n) / min(m, n), -m)) if times else None
        known = {name: ms for name, ms in times.get(near or 0, {}).items() if name in codes}
        name = min(usable, key=lambda c: known.get(c, math.inf)) if known else usable[-1]
        table.append(name)
        why = "the fastest" if len(known) > 1 else "the only one"
        first = n
        if rows and (rows[-1].code, rows[-1].timed_at) == (name, near):
            first = rows.pop().first
        rows.append(StageReport(stage, first, n, name, why, known, near))
    return table, rows
