"""Reads a page of results as a browser does: its text, tables and elements."""

from __future__ import annotations

from html.parser import HTMLParser

_WITHOUT_END = {"img", "meta"}


class Page(HTMLParser):
    """Fails on elements that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""  # without the style
        self.style = ""
        self.headings: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in _WITHOUT_END:
            return
        self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "h2":
            self.headings.append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" in self._open:
            self.style += data
            return
        self.text += data
        if "td" in self._open or "th" in self._open:
            self.tables[-1][-1][-1] += data
        if "h2" in self._open:
            self.headings[-1] += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of all elements of a kind."""
        return [attributes for name, attributes in self.elements if name == tag]

    def table(self, *headings: str) -> list[list[str]]:
        """Rows of the only table whose headings begin so."""
        (found,) = [t[1:] for t in self.tables if tuple(t[0][: len(headings)]) == headings]
        return found


def check_alone_and_accessible(page: Page) -> None:
    """Nothing comes from outside, and everything that is shown is said in words."""
    assert page.named("script") == page.named("link") == page.named("iframe") == []
    for _, attributes in page.elements:
        assert not any(name.startswith("on") or name == "href" for name in attributes)
    assert "url(" not in page.style and "@import" not in page.style
    assert all(image["src"].startswith("data:image/") for image in page.named("img"))
    assert all(image["alt"] for image in page.named("img"))
    for svg in page.named("svg"):
        assert svg.get("aria-label") or svg.get("aria-hidden") == "true"
    assert all(heading["scope"] in ("row", "col") for heading in page.named("th"))
    assert page.named("html") == [{"lang": "en"}]
