"""Accuracy against what it costs: FLOPs and milliseconds."""

from __future__ import annotations

from collections.abc import Sequence

from ..policy import Estimate
from .evaluated import Evaluated
from .markup import Html, details, table
from .plots import Mark, Series, curves
from .sections import percent

_POWERS = ((1e9, "billion FLOPs"), (1e6, "million FLOPs"), (1e3, "thousand FLOPs"), (1, "FLOPs"))


def against_flops(runs: Sequence[Evaluated]) -> Html:
    """In percent of the whole network, or, if runs differ in it, in FLOPs."""
    most = max(run.flops.without_exits for run in runs)
    unit, label = most / 100, "FLOPs per image, % of the whole network"
    if any(run.flops.without_exits != most for run in runs):
        unit, name = next((unit, name) for unit, name in _POWERS if most >= unit)
        label = f"{name} per image"
    return _plot(
        label,
        runs,
        [[(s.flops / unit, s.accuracy) for s in run.sweep] for run in runs],
        [Estimate(*(value / unit for value in run.flops_per_sample)) for run in runs],
        [run.flops.without_exits / unit for run in runs],
    )


def against_time(runs: Sequence[Evaluated]) -> Html | None:
    """None if a run was not timed."""
    speeds = [run.speed for run in runs if run.speed is not None]
    if len(speeds) < len(runs):
        return None
    sizes = " and ".join(str(size) for size in sorted({speed.batch for speed in speeds}))
    return _plot(
        f"milliseconds per image, batches of {sizes}",
        runs,
        [
            [(ms, s.accuracy) for ms, s in zip(speed.settings, run.timed, strict=True)]
            for run, speed in zip(runs, speeds, strict=True)
        ],
        [speed.exits for speed in speeds],
        [speed.whole.value for speed in speeds],
    )


def _plot(
    label: str,
    runs: Sequence[Evaluated],
    curve: Sequence[Sequence[tuple[float, float]]],
    chosen: Sequence[Estimate],
    whole: Sequence[float],
) -> Html:
    """Args, by run: curve, (cost, accuracy) of other thresholds; chosen, whole: costs of the
    thresholds that are set, and of the whole network."""
    series, marks = [], []
    for i, run in enumerate(runs):
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        if run.exits > 1:
            xs = [x for x, _ in curve[i]]
            ys = [100 * y for _, y in curve[i]]
            series.append(Series(f"{prefix}thresholds moved together", xs, ys, colour=i))
            accuracy = Estimate(*(100 * value for value in run.accuracy))
            marks.append(
                Mark(
                    f"{prefix}chosen thresholds", chosen[i].value, accuracy.value,
                    chosen[i][1:], accuracy[1:], colour=i,
                )
            )  # fmt: skip
        at_end = Estimate(*(100 * value for value in run.accuracy_at_end))
        marks.append(
            Mark(
                f"{prefix}whole network", whole[i], at_end.value,
                y_interval=at_end[1:] if run.exits == 1 else None,
                colour=i if len(runs) > 1 else 1, is_whole=True,
            )
        )  # fmt: skip
    said = "; ".join(f"{mark.name} at {mark.x:.3g}, {mark.y:.1f}%" for mark in marks)
    return curves(series, marks, label, "accuracy, %", f"Accuracy against {label}: {said}.")


def numbers(run: Evaluated) -> Html:
    """Points of the curves of one run, for who cannot see them."""
    ms = [None] * len(run.timed) if run.speed is None else run.speed.settings
    rows = [
        [percent(setting.flops / run.flops.without_exits), *([f"{t:.3g}"] if t else []),
         percent(setting.accuracy)]
        for setting, t in zip(run.timed, ms, strict=True)
    ]  # fmt: skip
    headings = ["FLOPs, % of the whole network", "accuracy, %"]
    if run.speed is not None:
        headings.insert(1, "milliseconds per image")
    return details("The numbers of these curves", table(headings, rows))
