"""Times candidates in turn and prints a row for each comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from elf_fast.timing import Samples, sample

from ..row import Row

#: (subject, baseline, target of the ratio or None), by the names of the candidates.
Pair = tuple[str, str, float | None]


def compare(
    suite: str,
    shape: str,
    candidates: Mapping[str, Callable[[], Any]],
    pairs: Sequence[Pair],
    *,
    seconds: float = 1.0,
    apart: bool = False,
) -> list[Row]:
    """Times the candidates in turn, for about `seconds`, and prints a row for each pair.

    Args:
        apart: only candidates with the same baseline take turns. Otherwise every candidate also
            finds the caches as the other ones leave them.
    """
    rows: list[Row] = []
    samples = Samples()
    for subject, baseline, least in pairs:
        if not {subject, baseline} <= samples.keys() or (apart and baseline != rows[-1].baseline):
            partners = {s for s, b, _ in pairs if b == baseline} | {baseline}
            chosen = {n: f for n, f in candidates.items() if not apart or n in partners}
            samples = sample(chosen, seconds=seconds)
        times = {"subject": samples.time(subject), "baseline": samples.time(baseline)}
        ratio = samples.ratio(baseline, subject)
        rows.append(Row(suite, subject, baseline, shape, ratio, least, times))
        print(rows[-1].line(), flush=True)
    return rows
