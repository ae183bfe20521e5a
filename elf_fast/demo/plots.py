"""The report's plots, on transparent background and in colours readable on light and dark pages."""

from __future__ import annotations

import statistics
from io import BytesIO
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .summary import mean_std, over_seeds

INK = "#808080"
ELF_COLOUR, PLAIN_COLOUR = "#2a9d8f", "#d9822b"
EXIT_COLOURS = ("#8fd0c8", "#2a9d8f", "#7b5ea7")


def png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=150, transparent=True, bbox_inches="tight")
    return buffer.getvalue()


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.grid(color=INK, alpha=0.2, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def accuracy_against_flops(results: dict[str, Any]) -> Figure:
    """Test accuracy of ELF for all thresholds, beside that of the network without exits."""
    figure, axes = _axes(7.0, 4.2)
    curves = [run["curve"] for run in results["runs"]]
    share, accuracy, low, high = [], [], [], []
    for points in zip(*curves, strict=True):
        mean, std = mean_std([100 * p["accuracy"] for p in points])
        share.append(100 * statistics.fmean(p["flops_share"] for p in points))
        accuracy.append(mean)
        low.append(mean - (std or 0.0))
        high.append(mean + (std or 0.0))
    axes.fill_between(share, low, high, color=ELF_COLOUR, alpha=0.18, linewidth=0)
    axes.plot(share, accuracy, color=ELF_COLOUR, linewidth=2, label="ELF, threshold varied")
    for model, colour, marker, label in (
        ("elf", ELF_COLOUR, "o", "ELF, threshold chosen on validation"),
        ("without_exits", PLAIN_COLOUR, "s", "the same network without exits"),
    ):
        x, _ = mean_std([100 * v for v in over_seeds(results, model, "flops_share") or []])
        y, std = mean_std([100 * v for v in over_seeds(results, model, "overall") or []])
        axes.errorbar(
            x, y, yerr=std, color=colour, marker=marker, markersize=9, capsize=4, linestyle="none",
            label=label, zorder=5,
        )  # fmt: skip
        if model == "without_exits":
            axes.axhline(y, color=colour, linewidth=1, linestyle="--", alpha=0.7)
    axes.set_xlabel("FLOPs per image, % of the network without exits")
    axes.set_ylabel("test accuracy, %")
    axes.set_xlim(0, None)
    axes.legend(frameon=False, labelcolor=INK, loc="lower right")
    return figure


def exit_shares_by_class(results: dict[str, Any]) -> Figure:
    """Share of the test images of every class that left at each exit, from head to tail."""
    figure, axes = _axes(7.0, 3.4)
    axes.grid(visible=False)
    per_seed = [run["test"]["elf"]["exit_shares_by_class"] for run in results["runs"]]
    classes, exits = range(len(per_seed[0])), range(len(per_seed[0][0]))
    bottom = [0.0 for _ in classes]
    for e in exits:
        share = [100 * statistics.fmean(run[c][e] for run in per_seed) for c in classes]
        axes.bar(classes, share, 0.78, bottom, color=EXIT_COLOURS[e], label=f"exit {e + 1}")
        bottom = [b + s for b, s in zip(bottom, share, strict=True)]
    axes.set_xticks(
        list(classes), [f"{c}\nn={n}" for c, n in enumerate(results["class_counts"])], fontsize=8
    )
    axes.set_xlabel("digit and its training images, head to tail")
    axes.set_ylabel("test images leaving, %")
    axes.legend(frameon=False, labelcolor=INK, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def examples(images: Tensor, targets: Tensor, predictions: Tensor) -> Figure:
    """A row of up to 10 images [n, 1, H, W] with their digit, wrong predictions marked."""
    n = len(images)
    figure = Figure(figsize=(10 * 0.8, 1.1))
    for i in range(n):
        axes = figure.add_subplot(1, 10, i + 1)
        axes.imshow(images[i, 0].numpy(), cmap="gray_r", vmin=-1, vmax=1)
        axes.set_axis_off()
        y, guess = int(targets[i]), int(predictions[i])
        right = y == guess
        axes.set_title(
            f"{y}" if right else f"{y}, got {guess}",
            fontsize=8,
            color=INK if right else PLAIN_COLOUR,
        )
    return figure
