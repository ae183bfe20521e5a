"""The demo's page: the parts of `page` with means over seeds."""

from __future__ import annotations

import statistics
from typing import Any

from ..page import plots, sections
from ..page.evaluated import Evaluated
from ..page.markup import Html, document, element, table
from ..page.run import early_wrong, exits
from ..page.sections import Bar, Headline, percent, points
from ..policy import Estimate
from . import summary

_OWN = """elf-fast train --data-dir photos --validation-fraction 0.1 --model resnet18 \\
  --loss balanced_softmax --conv-heads --output runs/photos
elf-fast eval runs/photos --report photos.html"""


def html(results: dict[str, Any], first: Evaluated) -> str:
    """The page. first: ELF of the first seed on the test set."""
    headings, rows = summary.table(results)
    versions = results["versions"]
    return document(
        "ELF on long-tailed digits",
        element("h1", "ELF on long-tailed handwritten digits"),
        element(
            "p",
            "A small network with an exit after each of its three stages, beside the same network "
            "without exits.",
            class_="soft",
        ),
        sections.headlines(_headlines(results, first)),
        _curve(results),
        element("p", " ".join(summary.sentences(results))),
        table(headings, [[label.strip(), *cells] for label, cells in rows]),
        element("h2", "Where each class leaves"),
        sections.exits_by_class(_bars(results, first), first.exits),
        element("h2", "Who leaves early and wrong"),
        element("p", "In the first seed.", class_="soft"),
        *early_wrong(first),
        element("h2", "How sure and how right each exit is"),
        element("p", "In the first seed.", class_="soft"),
        *exits(first),
        element(
            "footer",
            element("p", "Intervals over seeds are Student's t; one split, seeds change weights "
                    "and batches. The band is one standard deviation; the curve moves one "
                    "threshold for all exits on the test images, and the dot is the threshold "
                    "that was chosen on validation."),
            element("p", f"elf_fast {versions['elf_fast']}, torch {versions['torch']}, "
                    f"{results['settings']['threads']} CPU thread. All numbers: results.json."),
        ),
        element("h2", "The same for your own images"),
        element("pre", _OWN),
    )  # fmt: skip


def _headlines(results: dict[str, Any], first: Evaluated) -> list[Headline]:
    seeds = len(results["runs"])

    def figure(name: str, key: str, alone: Estimate, *notes: str) -> Headline:
        over_seeds = summary.t_interval(summary.over_seeds(results, "elf", key) or [])
        value, low, high = (percent(v) for v in over_seeds or alone)
        of = f"over {seeds} seeds" if over_seeds else "of one seed"
        return Headline(name, f"{value}%", [f"95% interval {low} to {high} {of}", *notes])

    gain = summary.t_interval(summary.differences(results, "overall") or [])
    against = "against the network without exits"
    entry = results["throughput"][0]
    low, ratio, high = (f"{value:.2f}" for value in entry["ratios"]["elf_fast/full"])
    return [
        figure("accuracy", "overall", first.accuracy,
               *([f"{points(gain)} points {against}"] if gain else [])),
        figure("compute", "flops_share", first.flops_share,
               "of the FLOPs of the network without exits"),
        Headline("speed", f"{ratio} \N{MULTIPLICATION SIGN}",
                 [f"quartiles {low} to {high}", "as many images per second as the network without "
                  f"exits, batches of {entry['batch_size']} on one CPU thread"]),
    ]  # fmt: skip


def _curve(results: dict[str, Any]) -> Html:
    """Accuracy against FLOPs for all thresholds, mean over seeds."""
    share, accuracy, low, high = [], [], [], []
    for settings in zip(*(run["curve"] for run in results["runs"]), strict=True):
        mean, std = summary.mean_std([100 * point["accuracy"] for point in settings])
        share.append(100 * statistics.fmean(point["flops_share"] for point in settings))
        accuracy.append(mean)
        low.append(mean - (std or 0.0))
        high.append(mean + (std or 0.0))
    marks = []
    for i, (model, name) in enumerate(
        (("elf", "ELF, threshold chosen on validation"), ("without_exits", "without exits"))
    ):
        x = statistics.fmean(summary.over_seeds(results, model, "flops_share") or [])
        values = summary.over_seeds(results, model, "overall") or []
        interval = summary.t_interval(values)
        ends = None if interval is None else (100 * interval.low, 100 * interval.high)
        marks.append(
            plots.Mark(name, 100 * x, 100 * statistics.fmean(values), None, ends, i, i > 0)
        )
    series = [plots.Series("ELF, threshold varied", share, accuracy, low, high)]
    said = "; ".join(f"{mark.name}: {mark.x:.0f}% and {mark.y:.1f}%" for mark in marks)
    return plots.curves(
        series, marks, "FLOPs per image, % of the network without exits", "test accuracy, %",
        f"Test accuracy against the share of FLOPs. {said}.",
    )  # fmt: skip


def _bars(results: dict[str, Any], first: Evaluated) -> list[Bar]:
    """Means over seeds; every class has test images."""
    per_seed = [run["test"]["elf"] for run in results["runs"]]
    found = []
    for c, (name, n) in enumerate(zip(first.class_names, first.class_counts, strict=True)):
        by_exit = zip(*(test["exit_shares_by_class"][c] for test in per_seed), strict=True)
        shares = [statistics.fmean(of_exit) for of_exit in by_exit]
        accuracy = statistics.fmean(test["per_class"][c] for test in per_seed)
        found.append(Bar(name, f"{n:,}", len(first.target), shares, accuracy))
    return found
