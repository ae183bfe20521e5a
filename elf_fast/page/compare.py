"""Runs side by side."""

from __future__ import annotations

from collections.abc import Sequence

from ..groups import GROUPS
from .evaluated import Evaluated
from .markup import Html, table
from .sections import interval, percent


def comparison(runs: Sequence[Evaluated]) -> Html:
    """A table with a column per run."""
    headings = ["", *(run.name for run in runs)]
    return table(headings, rows(runs), "Each run with its own thresholds")


def rows(runs: Sequence[Evaluated]) -> list[list[str]]:
    """For every figure its name and its value in each run."""
    columns = []
    for run in runs:
        m = run.observed.metrics
        column = {"accuracy, % [95% interval]": interval(run.accuracy)}
        column |= {f"accuracy {group}, %": percent(m[group]) for group in GROUPS}
        column["balanced accuracy, %"] = percent(m["balanced_accuracy"])
        column["macro F1, %"] = percent(m["f1"])
        column["calibration error, %"] = percent(m["ece"])
        column["million FLOPs per image"] = f"{run.flops_per_sample.value / 1e6:,.3g}"
        column["FLOPs, % of its whole network"] = percent(m["flops_share"])
        column["accuracy of its whole network, %"] = percent(m["anytime_accuracy"][-1])
        column["left at each exit, %"] = " / ".join(percent(s, 0) for s in m["exit_shares"] or ())
        if run.speed is not None:
            ms = run.speed.exits if run.exits > 1 else run.speed.whole
            column["milliseconds per image"] = f"{ms.value:.3g} [{ms.low:.3g}, {ms.high:.3g}]"
        columns.append(column)
    labels = list(dict.fromkeys(label for column in columns for label in column))
    return [[label, *(column.get(label, "") for column in columns)] for label in labels]
