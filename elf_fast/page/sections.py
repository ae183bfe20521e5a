"""Parts of a page, from plain numbers. Accuracies and shares are in [0, 1]; None: not known."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..policy import Estimate
from .markup import Html, details, element, table
from .plots import reliability

#: Pixels of the longer side of a small image; smaller ones are shown as they are.
THUMBNAIL = 128
BARS = 40  # of the plot by class; more classes share them


def percent(value: float | None, digits: int = 1) -> str:
    return "none" if value is None else f"{100 * value:.{digits}f}"


def interval(estimate: Estimate | None, digits: int = 1) -> str:
    """An estimate in percent with its interval."""
    if estimate is None:
        return "none"
    value, low, high = (f"{100 * number:.{digits}f}" for number in estimate)
    return f"{value} [{low}, {high}]"


def points(estimate: Estimate | None) -> str:
    """A difference in points with its interval."""
    if estimate is None:
        return "none"
    # Adding 0.0 turns a rounded -0.0 into 0.0.
    value, low, high = (f"{round(100 * number, 1) + 0.0:+.1f}" for number in estimate)
    return f"{value} [{low}, {high}]"


class Headline(NamedTuple):
    """One of the figures at the top."""

    label: str
    value: str
    notes: Sequence[str]


def headlines(figures: Sequence[Headline]) -> Html:
    entries = (
        element(
            "div",
            element("dt", figure.label),
            element("dd", figure.value, class_="value"),
            *(element("dd", note, class_="soft") for note in figure.notes),
        )
        for figure in figures
    )
    return element("dl", *entries, class_="figures")


class Bar(NamedTuple):
    """A class, or several neighbours from head to tail."""

    label: str
    training: str  # training images
    samples: int  # that were evaluated
    shares: list[float] | None  # [E] that left at each exit
    accuracy: float | None


def bars(
    class_names: Sequence[str], class_counts: Sequence[int], counts: Tensor
) -> tuple[list[Bar], bool]:
    """Bars from the class with most training images to the one with fewest, and whether a bar is
    one class. counts: [E, C, 2] samples by exit, class, and wrong or right."""
    order = sorted(range(len(class_counts)), key=lambda c: -class_counts[c])
    is_single = len(order) <= BARS
    edges = [round(i * len(order) / BARS) for i in range(BARS + 1)]
    groups = [[c] for c in order]
    if not is_single:
        groups = [order[a:b] for a, b in pairwise(edges)]
    found = []
    for classes in groups:
        of_group = counts[:, classes].sum(1)
        n = int(of_group.sum())
        sizes = [class_counts[c] for c in classes]
        label = class_names[classes[0]]
        if len(classes) > 1:
            label += f" to {class_names[classes[-1]]}, {len(classes)} classes"
        training = f"{sizes[0]:,}" if sizes[0] == sizes[-1] else f"{sizes[0]:,} to {sizes[-1]:,}"
        shares = (of_group.sum(1) / n).tolist() if n else None
        found.append(
            Bar(label, training, n, shares, of_group[:, 1].sum().item() / n if n else None)
        )
    return found, is_single


def exits_by_class(found: Sequence[Bar], exits: int) -> Html:
    """A table whose cells hold the bars, with the numbers for who cannot see them."""
    rows = []
    for bar in found:
        cell: Any = "no images"
        if bar.shares is not None:
            said = ", ".join(f"exit {e + 1}: {100 * s:.0f}%" for e, s in enumerate(bar.shares))
            pieces = (
                element("span", style=f"--at: {_at(e, exits)}; width: {100 * s:.1f}%")
                for e, s in enumerate(bar.shares)
                if s > 0
            )
            cell = element("div", *pieces, class_="bar", role="img", aria_label=said, title=said)
        rows.append([bar.label, bar.training, cell, percent(bar.accuracy)])
    names = [f"exit {e + 1}" for e in range(exits - 1)] + ["to the end"]
    keys = (
        element("li", element("span", class_="box", style=f"--at: {_at(e, exits)}"), name)
        for e, name in enumerate(names)
    )
    headings = [
        "class",
        "training images",
        element("span", "left at", class_="bar-of"),
        "accuracy, %",
    ]
    return Html(element("ul", *keys, class_="legend") + table(headings, rows))


def _at(e: int, exits: int) -> str:
    return f"{100 * e / max(1, exits - 1):.0f}%"


class Bins(NamedTuple):
    """A reliability diagram of one exit; see `plots.reliability`."""

    confidence: list[float]
    accuracy: list[float]
    share: list[float]


def bins(probability: Tensor, correct: Tensor, number: int) -> Bins:
    """Equal-width bins of probability [N] that hold samples; correct: [N] bool."""
    index = (probability * number).long().clamp(0, number - 1)
    n = torch.bincount(index, minlength=number).double()
    sums = (
        torch.zeros(number, dtype=torch.float64).index_add_(0, index, values.double())
        for values in (probability, correct)
    )
    confidence, accuracy = ((total / n)[n > 0].tolist() for total in sums)
    return Bins(confidence, accuracy, (n / len(probability))[n > 0].tolist())


def reliability_by_exit(found: Sequence[Bins], errors: Sequence[float | None]) -> Html:
    figures = []
    for e, (of_exit, error) in enumerate(zip(found, errors, strict=True)):
        name = f"exit {e + 1}" if e + 1 < len(found) else "last exit"
        note = "" if error is None else f", calibration error {100 * error:.1f}%"
        description = f"Accuracy against confidence, {name}; the numbers are in the table below."
        figures.append(
            element(
                "figure",
                reliability(*of_exit, description),
                element("figcaption", f"{name}{note}"),
            )
        )
    rows = [
        [f"{e + 1}", percent(c), percent(a), percent(n)]
        for e, of_exit in enumerate(found)
        for c, a, n in zip(*of_exit, strict=True)
    ]
    numbers = table(["exit", "confidence, %", "accuracy, %", "share of images, %"], rows)
    shown = element("div", *figures, class_="plots small")
    return Html(shown + details("The numbers of these plots", numbers))


class Thumbnail(NamedTuple):
    image: Image.Image
    description: str  # for who cannot see the image
    lines: list[str]


def picture(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """The input of a network [1 or 3, H, W] as an image; mean and std: of its preprocessing."""
    shape = (-1, 1, 1)
    values = image.float() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    pixels = (255 * values.nan_to_num().clamp(0, 1)).round().byte()
    grey = len(pixels) == 1
    return Image.fromarray(pixels[0].numpy() if grey else pixels.permute(1, 2, 0).numpy())


def thumbnails(shown: Sequence[Thumbnail]) -> Html:
    items = []
    for image, description, lines in shown:
        large = max(image.size) > THUMBNAIL // 2
        small = image.copy()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = BytesIO()
        small.save(buffer, "JPEG" if large else "PNG", quality=85)
        data = base64.b64encode(buffer.getvalue()).decode()
        kind = "jpeg" if large else "png"
        items.append(
            element(
                "li",
                element("img", src=f"data:image/{kind};base64,{data}", alt=description,
                        class_=None if large else "pixels"),
                *(element("div", line, class_="soft" if i else None)
                  for i, line in enumerate(lines)),
            )
        )  # fmt: skip
    return element("ul", *items, class_="thumbs")
