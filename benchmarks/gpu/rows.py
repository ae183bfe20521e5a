"""The rows of a GPU: the project's kernels beside their baselines and limits, with the targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from elf_fast.timing import Quartiles

from ..row import Row, quartiles_of_ratio
from .cases import Case
from .jobs import Job
from .timing import Candidate, Measured

#: Bytes from which on the time of a launch no longer counts.
LARGE = 64e6


def describe(shape: Sequence[int], dtype: str, settings: Mapping[str, Any]) -> str:
    """The shape of a row in words; settings in bytes follow from it and are left out."""
    said = (
        value if isinstance(value, str) else f"{name} {value}"
        for name, value in settings.items()
        if not name.endswith("bytes")
    )
    return ", ".join([f"{list(shape)} {dtype}", *said])


def target(
    op: str, baseline: str, shape: Sequence[int], bytes: int, settings: Mapping[str, Any]
) -> float | None:
    """What the ratio of a kernel of the project must reach beside a baseline; None: no target.

    A target beside "copy" is a share of copy bandwidth. Beside "launch + copy" it counts the time
    of a launch as well, which small copies cannot avoid."""
    if op == "exit_gate":
        N, C = shape
        asked: dict[str, float] = {}
        if (N, C) == (256, 1000) and settings["criterion"] == "confidence":
            asked |= {"eager": 5.0, "torch.compile": 1.5}
        if bytes >= LARGE:
            asked["copy"] = 0.8
        if N <= 256 and C <= 1000:
            asked["empty launch"] = 1 / 1.3
        return asked.get(baseline)
    if op.startswith("compact") and baseline == ("copy" if bytes >= LARGE else "launch + copy"):
        if op == "compact_":
            return 1 / 1.3
        return 0.8 if settings["row bytes"] >= 2048 else None
    if op == "exit_head" and baseline == "copy":
        return 0.8 if bytes >= 40e6 else None
    if op == "exit_loss" and baseline == "torch.compile":
        return 1.5
    return None


def rows_of(job: Job, case: Case, measured: Measured, copied: int) -> list[Row]:
    """The rows of the project's candidates in a case.

    Args:
        copied: bytes that the ceiling "copy" reads and writes.
    """
    rows = []
    shape = describe(job.shape, job.dtype, job.settings | case.about)
    for own in case.candidates:
        if not _is_own(own) or own.key not in measured.samples:
            continue
        beside = dict(_baselines(own, case, measured))
        if own.bytes and own.key not in measured.synchronising:
            beside |= _limits(own, measured, copied)
        times = measured.samples[own.key]
        for baseline, needed in beside.items():
            least = target(own.op, baseline, job.shape, own.bytes, job.settings | case.about)
            # Beside a launch only targets are of interest.
            if "launch" in baseline and least is None:
                continue
            needs = {"subject": Quartiles.of(times), "baseline": Quartiles.of(needed)}
            ratio = quartiles_of_ratio(needed, times)
            rows.append(Row(own.op, _subject(own), baseline, shape, ratio, least, needs,
                            bytes=own.bytes))  # fmt: skip
    return rows


def errors_of(job: Job, case: Case, errors: Mapping[str, str]) -> list[dict[str, str]]:
    """The candidates of a case that failed or were wrong, as the results file has them."""
    shape = describe(job.shape, job.dtype, job.settings | case.about)
    return [
        {"subject": _subject(c), "shape": shape, "error": errors[c.key]}
        for c in case.candidates
        if c.key in errors
    ]


def _subject(candidate: Candidate) -> str:
    if candidate.op == "network":
        return candidate.name
    return f"{candidate.op}, {candidate.name}"


def _is_own(candidate: Candidate) -> bool:
    """Whether it is the project's: a kernel, or a network on the default kernels."""
    return candidate.backend is not None or candidate.name == "elf_fast"


def _baselines(
    own: Candidate, case: Case, measured: Measured
) -> Iterator[tuple[str, Sequence[float]]]:
    """The times of what a user could run instead. Both synchronise or neither does, except for
    networks, which are compared with all others."""
    for other in case.candidates:
        if other.op != own.op or _is_own(other) or other.key not in measured.samples:
            continue
        alike = (other.key in measured.synchronising) == (own.key in measured.synchronising)
        if alike or own.op == "network":
            yield other.name, measured.samples[other.key]


def _limits(own: Candidate, measured: Measured, copied: int) -> dict[str, list[float]]:
    """The times, round by round, of a launch and of a copy of the candidate's bytes."""
    launch = measured.samples["empty launch"]
    copy = [own.bytes * t / copied for t in measured.samples["copy"]]
    both = [a + b for a, b in zip(launch, copy, strict=True)]
    return {"copy": copy, "empty launch": launch, "launch + copy": both}
