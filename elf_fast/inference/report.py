"""What an engine says of itself."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Report", "StageReport"]


@dataclass(frozen=True)
class StageReport:
    """One stage at a range of batch sizes."""

    stage: int
    first: int  # the smallest batch size of the range
    last: int  # the largest
    code: str  # what serves
    why: str
    #: Milliseconds (median) of each code that was timed, at the batch size `timed_at`.
    milliseconds: dict[str, float] = field(default_factory=dict)
    timed_at: int | None = None


@dataclass(frozen=True)
class Report:
    """What serves each stage at which batch sizes, and why. `print` it for a table."""

    engine: str  # as it was asked for
    stages: tuple[StageReport, ...]
    #: Code that could not be used, and why.
    unavailable: tuple[str, ...] = ()
    #: Where the compiled code is kept; None: nowhere.
    cache: str | None = None
    from_cache: bool = False

    def __str__(self) -> str:
        lines = [f"engine {self.engine}"]
        if self.cache is not None:
            lines[0] += f", {'from' if self.from_cache else 'kept in'} {self.cache}"
        for row in self.stages:
            sizes = f"{row.first}" if row.first == row.last else f"{row.first} to {row.last}"
            times = ", ".join(f"{name} {ms:.3g}" for name, ms in row.milliseconds.items())
            times = f" ({times} ms for {row.timed_at})" if times else ""
            lines.append(f"stage {row.stage}, batches of {sizes}: {row.code}, {row.why}{times}")
        return "\n".join([*lines, *self.unavailable])
