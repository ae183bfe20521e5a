"""HTML and SVG elements, in which all text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

__all__ = ["Html", "details", "document", "element", "table"]

_WITHOUT_END = ("img", "meta")


class Html(str):
    """Text that is HTML already. All other text is escaped where it enters an element."""

    __slots__ = ()


def element(name: str, /, *children: Any, **attributes: Any) -> Html:
    """An element. In names of attributes, an underscore at the end is dropped and others become
    hyphens; an attribute that is None is left out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _WITHOUT_END:
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{joined(children)}</{name}>")


def joined(parts: Iterable[Any]) -> Html:
    return Html("".join(part if isinstance(part, Html) else escape(str(part)) for part in parts))


def table(headings: Sequence[Any], rows: Iterable[Sequence[Any]], caption: str = "") -> Html:
    """A table that scrolls sideways where it is wider than the page. The first cell of a row is its
    heading."""
    head = element("tr", *(element("th", heading, scope="col") for heading in headings))
    body = (
        element("tr", element("th", first, scope="row"), *(element("td", cell) for cell in cells))
        for first, *cells in rows
    )
    parts = [element("caption", caption)] if caption else []
    whole = element("table", *parts, element("thead", head), element("tbody", *body))
    return element("div", whole, class_="wide", tabindex="0", role="region",
                   aria_label=caption or str(headings[0]))  # fmt: skip


def details(summary: str, *children: Any) -> Html:
    """Parts that the reader opens."""
    return element("details", element("summary", summary), *children)


def document(title: str, *body: Any) -> str:
    """A whole page, which needs no other file."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Html(STYLE)),
    )
    return "<!doctype html>\n" + element(
        "html", head, element("body", element("main", *body)), lang="en"
    )


#: Series are told apart by colour and by dashes or marks. Every colour of text has a contrast of at
#: least 4.5 to the paper, and every line one of 3.
STYLE = """
:root { color-scheme: light dark; --paper: #fffefb; --ink: #1d1d1b; --soft: #5c5a55;
  --rule: #d9d6ce; --c0: #0f766e; --c1: #b4530a; --c2: #4f46b8; --c3: #a3265f; --c4: #55700f;
  --c5: #1f6fb2; --first: #9fd3c7; --last: #2c3f8f; }
@media (prefers-color-scheme: dark) { :root { --paper: #161615; --ink: #e9e7e1; --soft: #a8a59d;
  --rule: #3a3936; --c0: #45b8a8; --c1: #e8954a; --c2: #a29bf5; --c3: #ec7fb0; --c4: #a9c25a;
  --c5: #6db3ee; --first: #2f6f66; --last: #c3c9ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 1.0625rem/1.55 Charter, "Bitstream Charter", "Iowan Old Style", Georgia, serif; }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1rem 4rem; }
h1 { font-size: 1.75rem; font-weight: 600; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; font-weight: 600; margin: 3rem 0 .5rem; }
p, ul { max-width: 42rem; margin: .6rem 0; overflow-wrap: anywhere; }
.soft, figcaption, caption, footer, summary { color: var(--soft); }
figcaption, caption, footer, summary, table, .legend, .thumbs { font-size: .875rem;
  line-height: 1.45; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr));
  gap: 1.2rem 2.5rem; margin: 1.8rem 0 1rem; padding: 0; border-top: 1px solid var(--rule);
  padding-top: 1.2rem; }
.figures dt { color: var(--soft); font-size: .9375rem; }
.figures dd { margin: 0; }
.figures .value { font-size: 2.5rem; line-height: 1.15; font-variant-numeric: lining-nums; }
.plots { display: grid; gap: 1rem 2.5rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.plots.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 14rem), 1fr)); }
figure { margin: 1rem 0; max-width: 36rem; }
figcaption { max-width: 42rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font: 12.5px system-ui, sans-serif; fill: var(--soft); }
svg .rule { stroke: var(--rule); } svg .axis { stroke: var(--soft); }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; list-style: none; padding: 0;
  margin: .3rem 0; }
.legend svg, .legend .box { display: inline-block; width: 1.6rem; height: .8rem;
  margin-right: .4rem; vertical-align: -.05rem; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-family: system-ui, sans-serif;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { padding: .28rem 1.1rem .28rem 0; text-align: right; font-weight: 400;
  border-bottom: 1px solid var(--rule); vertical-align: baseline; white-space: nowrap; }
thead th { color: var(--soft); border-bottom-color: var(--soft); vertical-align: bottom;
  white-space: normal; }
th:first-child { text-align: left; }
tbody th:first-child { white-space: normal; min-width: 4.5rem; overflow-wrap: anywhere; }
.bar { display: flex; width: clamp(5.5rem, 28vw, 24rem); height: .85rem; }
th:has(> .bar-of) { text-align: left; }
.bar span, .legend .box { background: color-mix(in oklab, var(--last) var(--at), var(--first)); }
td:has(> .bar) { padding-top: .4rem; vertical-align: middle; }
.thumbs { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr));
  gap: 1.2rem; list-style: none; padding: 0; max-width: none; }
.thumbs img { display: block; width: 6rem; height: 6rem; object-fit: contain;
  object-position: left; margin-bottom: .3rem; }
.thumbs img.pixels { image-rendering: pixelated; }
@media (max-width: 44rem) { th, td { padding-right: .75rem; } .interval { display: block; } }
details { margin: .6rem 0; } summary { cursor: pointer; }
pre { overflow-x: auto; font-size: .875rem; padding: .7rem 0; border-top: 1px solid var(--rule);
  border-bottom: 1px solid var(--rule); max-width: 42rem; }
footer { margin-top: 3rem; border-top: 1px solid var(--rule); padding-top: .8rem;
  max-width: 42rem; }
@media print { details { display: none; } }
"""
