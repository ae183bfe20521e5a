"""A hook of mkdocs: pages of the site that lie outside of docs/, and their links.

GitHub shows README.md at the root and links from it into docs/; mkdocs reads docs/ only. The hook
adds such pages to the site and rewrites relative links, so that one text serves both.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
#: By path in the repository: the path in the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
}
_LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)")


def on_files(files: Files, *, config: Any) -> Files:
    """Adds the pages, and the files outside of docs/ that a page links to."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for page in list(files.documentation_pages()):
        for link in _LINK.findall(page.content_string):
            target = _in_site(Path(page.abs_src_path or ""), link)
            source = ROOT / target
            if target.startswith("source/") and target not in files.src_uris:
                source = ROOT / target.removeprefix("source/")
                files.append(File.generated(config, target, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Turns links from the repository's folders into links between the site's."""
    here = os.path.dirname(page.file.src_uri)
    source = Path(page.file.abs_src_path)
    return _LINK.sub(lambda link: os.path.relpath(_in_site(source, link[1]), here or "."), markdown)


def _in_site(page: Path, link: str) -> str:
    """Where in the site the file lies to which a page links."""
    target = Path(os.path.normpath(page.parent / link)).relative_to(ROOT).as_posix()
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return PAGES.get(target, f"source/{target}")
