"""Rows of figures: candidates timed side by side, and how often as fast one is as another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elf_fast.bench.timing import Quartiles, Samples, sample


@dataclass(frozen=True)
class Row:
    """`ratio`: what the baseline needs over what the subject needs, time or memory, repetition by
    repetition: above 1 the subject is better."""

    suite: str
    subject: str
    baseline: str
    shape: str
    ratio: Quartiles
    least: float | None  # what `ratio` must reach; None: the row informs
    needs: dict[str, Quartiles]  # "subject" and "baseline"
    unit: str = "us"  # of `needs`

    @property
    def holds(self) -> bool | None:
        """The median reaches `least`. "No worse" (1.0) allows for noise: equals fall on either
        side, so the upper quartile must reach it."""
        if self.least is None:
            return None
        return (self.ratio.high if self.least == 1.0 else self.ratio.median) >= self.least

    def line(self) -> str:
        asked = "" if self.least is None else f">= {self.least:.3g}"
        mark = {True: "holds", False: "MISSED", None: ""}[self.holds]
        spread = f"({self.ratio.low:.3g}..{self.ratio.high:.3g})"
        return (
            f"{self.subject:28} {self.baseline:16} {self.shape:48} {self.ratio.median:7.3g} "
            f"{spread:16} {asked:8} {mark:7} {amount(self.needs['subject'].median, self.unit):>9}"
        )


HEADING = (
    f"{'subject':28} {'beside':16} {'shape':48} {'times':>7} {'quartiles':16} {'asked':8} {'':7} "
    f"{'subject':>9}"
)

#: (subject, baseline, least ratio or None), by the names of candidates.
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
    """Times the candidates in turn, for about `seconds`, and prints a row for each pair. apart:
    only those that have a baseline in common take turns, so that no third empties the caches."""
    rows = []
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


def amount(value: float, unit: str) -> str:
    if unit == "us":
        for larger, size in (("s", 1e6), ("ms", 1e3)):
            if value >= size:
                return f"{value / size:.3g} {larger}"
    return f"{value:.3g} {unit}"
