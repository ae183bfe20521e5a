"""Chooses the code of each part for each batch size, by times measured on this machine."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..timing import sample
from .code import Code
from .parts import Example, example_rows
from .report import StageReport

__all__ = ["Times", "choose", "measure", "sizes_to_time"]

#: Of one part: milliseconds by batch size and name of the code.
Times = dict[int, dict[str, float]]

#: Seconds in which the codes of one part are timed at one batch size. At least five runs each.
SECONDS = 0.4


def sizes_to_time(max_batch: int, buckets: Sequence[int]) -> list[int]:
    return sorted({n for n in (1, 4, 16, 64, *buckets, max_batch) if n <= max_batch})


def measure(codes: Sequence[Code], example: Example, n: int) -> dict[str, float]:
    """Median milliseconds of each code that takes n samples, timed in turns."""
    x = example_rows(example.x, n)
    fit = {code.name: code.run for code in codes if code.batch in (None, n)}
    with torch.inference_mode():
        times = sample({name: _call(run, x) for name, run in fit.items()}, seconds=SECONDS)
    return {name: times.time(name).median / 1e3 for name in fit}


def _call(run, x):
    return lambda: run(x)


def choose(
    stage: int, codes: Sequence[Code], times: Times, max_batch: int
) -> tuple[list[Code], list[StageReport]]:
    """The code for every n of 0..max_batch: the fastest one at the nearest batch size (by ratio)
    that was timed. Code for a single batch size serves that size only."""
    timed = sorted(times)
    table, rows = [codes[0]], list[StageReport]()
    for n in range(1, max_batch + 1):
        usable = [code for code in codes if code.batch in (None, n)]
        near = min(timed, key=lambda m: max(m, n) / min(m, n)) if timed else None
        if near is None:
            code, why = usable[-1], "the only one"
        else:
            code = min(usable, key=lambda c: times[near].get(c.name, float("inf")))
            why = "fastest" if len(times[near]) > 1 else "the only one"
        table.append(code)
        shown = times[near] if near is not None else {}
        if rows and (rows[-1].code, rows[-1].timed_at) == (code.name, near):
            rows[-1] = StageReport(stage, rows[-1].first, n, code.name, why, shown, near)
        else:
            rows.append(StageReport(stage, n, n, code.name, why, shown, near))
    return table, rows
