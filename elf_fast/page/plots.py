"""Plots as inline SVG, whose colours follow the page's light or dark style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .markup import Html, element

WIDTH, HEIGHT = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 12, 46
COLOURS = 6
DASHES = (None, "7 4", "2 3")


@dataclass(frozen=True)
class Series:
    """A curve. low, high: a band around it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    colour: int = 0


@dataclass(frozen=True)
class Mark:
    """A point with intervals (low, high), where known. A diamond where `is_whole`, else a dot."""

    name: str
    x: float
    y: float
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None
    colour: int = 0
    is_whole: bool = False


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers in [low, high], at most `most` + 1 of them."""
    raw = (high - low) / most
    if not (raw > 0 and math.isfinite(raw)):
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10, 20) if power * m >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


class Axes:
    """Maps numbers to the plot's coordinates and collects what is drawn."""

    def __init__(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        x_label: str,
        y_label: str,
        *,
        size: tuple[int, int] = (WIDTH, HEIGHT),
        most: int = 6,
    ) -> None:
        self.size, self._x, self._y = size, x, y
        width, height = size
        bottom, right = height - _BOTTOM, width - _RIGHT
        self.parts: list[Html] = []
        for value in ticks(*y, most):
            at = self.y(value)
            self._line(_LEFT, at, right, at, class_="rule")
            self._text(f"{value:g}", _LEFT - 7, at + 4, "end")
        self._line(_LEFT, bottom, right, bottom, class_="axis")
        for value in ticks(*x, most):
            at = self.x(value)
            self._line(at, bottom, at, bottom + 4, class_="axis")
            self._text(f"{value:g}", at, bottom + 18, "middle")
        self._text(x_label, (_LEFT + right) / 2, height - 6, "middle")
        middle = (_TOP + bottom) / 2
        self._text(y_label, 11, middle, "middle", transform=f"rotate(-90 11 {_n(middle)})")

    def x(self, value: float) -> float:
        low, high = self._x
        return _LEFT + (value - low) / (high - low) * (self.size[0] - _RIGHT - _LEFT)

    def y(self, value: float) -> float:
        low, high = self._y
        bottom = self.size[1] - _BOTTOM
        return bottom - (value - low) / (high - low) * (bottom - _TOP)

    def band(self, series: Series) -> None:
        there = zip(series.x, series.low, strict=True)
        back = zip(reversed(series.x), reversed(series.high), strict=True)
        points = " ".join(f"{_n(self.x(x))},{_n(self.y(y))}" for x, y in (*there, *back))
        fill = f"fill: {colour(series.colour)}; opacity: .16"
        self.parts.append(element("polygon", points=points, style=fill))

    def curve(self, series: Series) -> None:
        points = " ".join(
            f"{_n(self.x(x))},{_n(self.y(y))}" for x, y in zip(series.x, series.y, strict=True)
        )
        self.parts.append(element("polyline", points=points, **_stroke(series.colour)))

    def mark(self, mark: Mark) -> None:
        x, y = self.x(mark.x), self.y(mark.y)
        stroke = f"stroke: {colour(mark.colour)}"
        for interval, vertical in ((mark.y_interval, True), (mark.x_interval, False)):
            if interval is not None:
                low, high = (self.y(v) if vertical else self.x(v) for v in interval)
                ends = (x, low, x, high) if vertical else (low, y, high, y)
                self._line(*ends, style=stroke, stroke_width="1.6")
        self.parts.append(symbol(x, y, mark))

    def level(self, y: float, number: int) -> None:
        """A thin dashed line across the plot."""
        at = self.y(y)
        self._line(_LEFT, at, self.size[0] - _RIGHT, at, style=f"stroke: {colour(number)}",
                   stroke_dasharray="2 4")  # fmt: skip

    def svg(self, description: str) -> Html:
        width, height = self.size
        return element("svg", *self.parts, viewBox=f"0 0 {width} {height}", role="img",
                       aria_label=description)  # fmt: skip

    def _line(self, x1: float, y1: float, x2: float, y2: float, **attributes: str) -> None:
        ends = {"x1": _n(x1), "y1": _n(y1), "x2": _n(x2), "y2": _n(y2)}
        self.parts.append(element("line", **ends, **attributes))

    def _text(self, text: str, x: float, y: float, anchor: str, **attributes: str) -> None:
        self.parts.append(element("text", text, x=_n(x), y=_n(y), text_anchor=anchor, **attributes))


def colour(number: int) -> str:
    return f"var(--c{number % COLOURS})"


def _stroke(number: int) -> dict[str, str | None]:
    """Further runs repeat the colours, dashed."""
    dash = DASHES[number // COLOURS % len(DASHES)]
    return {
        "style": f"stroke: {colour(number)}",
        "fill": "none",
        "stroke_width": "2",
        "stroke_dasharray": dash,
    }


def symbol(x: float, y: float, mark: Mark) -> Html:
    style = f"fill: {colour(mark.colour)}; stroke: var(--paper)"
    if not mark.is_whole:
        return element("circle", cx=_n(x), cy=_n(y), r="5.5", style=style)
    corners = " ".join(
        f"{_n(x + dx)},{_n(y + dy)}" for dx, dy in ((0, -7), (7, 0), (0, 7), (-7, 0))
    )
    return element("polygon", points=corners, style=style)


def legend(series: Sequence[Series], marks: Sequence[Mark]) -> Html:
    """What the signs of a plot mean, as HTML, so that it wraps on small screens."""
    entries = [
        (element("line", x1="1", x2="31", y1="8", y2="8", **_stroke(s.colour)), s.name)
        for s in series
        if len(s.x) > 1
    ]
    entries += [(symbol(16, 8, mark), mark.name) for mark in marks]
    items = (
        element("li", element("svg", sign, viewBox="0 0 32 16", aria_hidden="true"), name)
        for sign, name in entries
    )
    return element("ul", *items, class_="legend")


def curves(
    series: Sequence[Series], marks: Sequence[Mark], x_label: str, y_label: str, description: str
) -> Html:
    """Curves and marked points over an x axis that begins at 0, with their legend."""
    xs = [x for s in series for x in s.x] + [m.x for m in marks]
    ys = [y for s in series for values in (s.y, s.low, s.high) for y in values]
    ys += [y for m in marks for y in (m.y, *(m.y_interval or ()))]
    low, high = min(ys, default=0.0), max(ys, default=1.0)
    margin = 0.05 * (high - low) or 1.0
    axes = Axes(
        (0.0, 1.04 * max(xs, default=1.0) or 1.0), (low - margin, high + margin), x_label, y_label
    )
    for s in series:
        if s.low:
            axes.band(s)
    for mark in marks:
        if mark.is_whole:
            axes.level(mark.y, mark.colour)
    for s in series:
        axes.curve(s)
    for mark in marks:
        axes.mark(mark)
    return element("figure", axes.svg(description), legend(series, marks))


def reliability(
    confidence: Sequence[float], accuracy: Sequence[float], share: Sequence[float], description: str
) -> Html:
    """A reliability diagram: [B] bins with their mean confidence, accuracy and share of samples,
    all in [0, 1]. The area of a dot is its share; on the diagonal, confidence equals accuracy."""
    axes = Axes((0, 100), (0, 100), "confidence, %", "accuracy, %", size=(250, 240), most=4)
    ends = {"x1": axes.x(0), "y1": axes.y(0), "x2": axes.x(100), "y2": axes.y(100)}
    axes.parts.append(element("line", **{k: _n(v) for k, v in ends.items()}, class_="axis",
                              stroke_dasharray="2 4"))  # fmt: skip
    for c, a, n in zip(confidence, accuracy, share, strict=True):
        radius = max(2.0, 16 * math.sqrt(n))
        at = {"cx": _n(axes.x(100 * c)), "cy": _n(axes.y(100 * a)), "r": _n(radius)}
        axes.parts.append(element("circle", **at, style=f"fill: {colour(0)}", fill_opacity=".6"))
    return axes.svg(description)


def _n(value: float) -> str:
    return f"{value:.1f}"
