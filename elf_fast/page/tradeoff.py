"""Accuracy against what it costs: FLOPs and milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..policy import Estimate
from .evaluated import Evaluated
from .markup import Html
from .plots import Mark, Series, curves

#: From shares [E] that leave at each exit to a cost per image.
_Cost = Callable[[list[float]], float]
_POWERS = ((1e9, "billion FLOPs"), (1e6, "million FLOPs"), (1e3, "thousand FLOPs"), (1, "FLOPs"))


def against_flops(runs: Sequence[Evaluated]) -> Html:
    """In percent of the whole network, or, if runs differ in it, in FLOPs."""
    most = max(run.flops.without_exits for run in runs)
    unit, label = most / 100, "FLOPs per image, % of the whole network"
    if any(run.flops.without_exits != most for run in runs):
        unit, name = next((unit, name) for unit, name in _POWERS if most >= unit)
        label = f"{name} per image"

    def cost(run: Evaluated) -> _Cost:
        costs = (run.costs / unit).tolist()
        return lambda shares: sum(s * c for s, c in zip(shares, costs, strict=True))

    return _plot(
        label,
        runs,
        [cost(run) for run in runs],
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
        [speed.leaving for speed in speeds],
        [speed.exits for speed in speeds],
        [speed.whole.value for speed in speeds],
    )


def _plot(
    label: str,
    runs: Sequence[Evaluated],
    costs: Sequence[_Cost],
    chosen: Sequence[Estimate],
    whole: Sequence[float],
) -> Html:
    """Args: costs, chosen, whole: by run, those of a point of the curve, of the thresholds that are
    set, and of the whole network."""
    series, marks = [], []
    for i, run in enumerate(runs):
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        if run.exits > 1:
            xs = [costs[i](shares) for _, shares in run.sweep]
            ys = [100 * accuracy for accuracy, _ in run.sweep]
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
