"""The demo's report: one HTML file with embedded plots, readable in light and dark mode."""

from __future__ import annotations

import base64
from html import escape
from typing import Any

from matplotlib.figure import Figure

from .plots import png
from .summary import sentences, table

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #8885; text-align: right; }
th:first-child, td:first-child { text-align: left; white-space: pre-wrap; }
img { max-width: 100%; height: auto; } figure { margin: 1rem 0; }
figcaption, footer { color: #808080; font-size: .9rem; }
"""


def html(results: dict[str, Any], figures: list[tuple[str, str, Figure]]) -> str:
    """The page. `figures`: (heading, caption, figure) in order."""
    headings, rows = table(results)
    head = "".join(f"<th>{escape(h)}</th>" for h in headings)
    body = "".join(
        f"<tr><td>{escape(label)}</td>{''.join(f'<td>{escape(c)}</td>' for c in cells)}</tr>"
        for label, cells in rows
    )
    text = "".join(f"<li>{escape(line)}</li>" for line in sentences(results))
    plots = "".join(
        f"<h2>{escape(heading)}</h2><figure><img alt='{escape(heading)}' "
        f"src='data:image/png;base64,{base64.b64encode(png(figure)).decode()}'>"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for heading, caption, figure in figures
    )
    versions = results["versions"]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<title>elf_fast demo</title><style>{_STYLE}</style></head><body>"
        "<h1>ELF on long-tailed handwritten digits</h1>"
        "<p>The same small network is trained twice per seed: without exits, and with an exit "
        "after each of its three stages (ELF). A sample leaves at the first exit whose confidence "
        "reaches the threshold.</p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"<ul>{text}</ul>{plots}"
        f"<footer>elf_fast {escape(versions['elf_fast'])}, torch {escape(versions['torch'])}, "
        f"{results['settings']['threads']} CPU threads. All numbers: results.json; "
        "<code>elf-fast eval model.safetensors</code> repeats those of the first seed.</footer>"
        "</body></html>\n"
    )
