"""`Row`: one comparison of a subject with a baseline, on a CPU or on a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from elf_fast.timing import Quartiles

#: Names in results that were recorded before a candidate got its present name.
EARLIER_NAMES = {"sceptic": "tuned PyTorch"}


@dataclass(frozen=True)
class Row:
    """`ratio`: what the baseline needs divided by what the subject needs, repetition by repetition.
    Above 1 the subject is better: it needs less time, or less memory."""

    suite: str
    subject: str
    baseline: str
    shape: str
    ratio: Quartiles
    least: float | None  # the target: what `ratio` must reach; None: the row has no target
    needs: dict[str, Quartiles]  # of "subject" and "baseline"
    unit: str = "us"  # of `needs`
    bytes: int = 0  # that the subject moves at least; 0: not recorded

    @property
    def holds(self) -> bool | None:
        """Whether the median reaches the target. For the target 1.0, "no worse", the upper quartile
        must reach it: the median of two equally fast candidates is as often below 1 as above."""
        if self.least is None:
            return None
        return (self.ratio.high if self.least == 1.0 else self.ratio.median) >= self.least

    @property
    def asked(self) -> str:
        """The target in words, empty without one."""
        return "" if self.least is None else f">= {self.least:.3g}"

    @property
    def needed(self) -> str:
        """What the subject needs, with its unit."""
        value = self.needs["subject"].median
        if self.unit == "us":
            for larger, size in (("s", 1e6), ("ms", 1e3)):
                if value >= size:
                    return f"{value / size:.3g} {larger}"
        return f"{value:.3g} {self.unit}"

    def line(self) -> str:
        """The row as text; `HEADING` names the columns."""
        mark = {True: "holds", False: "MISSED", None: ""}[self.holds]
        spread = f"({self.ratio.low:.3g}..{self.ratio.high:.3g})"
        return (
            f"{self.subject:31} {self.baseline:20} {self.shape:62} {self.ratio.median:7.3g} "
            f"{spread:16} {self.asked:8} {mark:7} {self.needed:>9}"
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"holds": self.holds}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Row:
        """The row of a results file, with the names that candidates have today."""
        known = {field.name: found[field.name] for field in fields(cls) if field.name in found}
        for part in ("subject", "baseline"):
            known[part] = EARLIER_NAMES.get(found[part], found[part])
        known["ratio"] = Quartiles(*found["ratio"])
        known["needs"] = {part: Quartiles(*values) for part, values in found["needs"].items()}
        return cls(**known)


HEADING = (
    f"{'subject':31} {'baseline':20} {'shape':62} {'ratio':>7} {'quartiles':16} {'target':8} "
    f"{'':7} {'subject':>9}"
)


def counts(rows: Iterable[Row]) -> tuple[int, int]:
    """How many targets hold, and how many are missed."""
    verdicts = [row.holds for row in rows]
    return verdicts.count(True), verdicts.count(False)


def closest(rows: Iterable[Row], n: int | None = None) -> list[Row]:
    """The n rows (None: all) that have a target, those furthest below it first."""
    judged = [(row.ratio.median / row.least, row) for row in rows if row.least is not None]
    return [row for _, row in sorted(judged, key=lambda pair: pair[0])][:n]


def quartiles_of_ratio(needed: Sequence[float], by_subject: Sequence[float]) -> Quartiles:
    """Quartiles of needed[i] / by_subject[i]."""
    return Quartiles.of([a / b for a, b in zip(needed, by_subject, strict=True)])
