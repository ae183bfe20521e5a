"""The site that `make docs` builds: every page and every public name is on it, and it builds."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import elf_fast

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
#: Public modules that `elf_fast` does not export. Each has its public names in `__all__`.
MODULES = ("backbones", "criteria", "data", "flops", "inference", "metrics", "models", "policy")


def nav_pages(entries: Any) -> Iterator[str]:
    """The pages of a nav in mkdocs' form: strings, and dicts from titles to pages or lists."""
    for entry in entries:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from nav_pages(value) if isinstance(value, list) else [value]


def pages_outside_docs() -> dict[str, str]:
    """`PAGES` of docs/site_pages.py, which imports mkdocs."""
    source = (DOCS / "site_pages.py").read_text(encoding="utf-8")
    return dict(re.findall(r'^    "([\w/.]+)": "([\w/.]+)",$', source, re.M))


def public_names() -> set[str]:
    """Names with their modules, such as elf_fast.losses.LDAMLoss; no modules."""
    exported = {
        name for name in elf_fast.__all__ if isinstance(getattr(elf_fast, name), ModuleType)
    }
    named = {f"elf_fast.{name}" for name in set(elf_fast.__all__) - exported}
    for name in exported.union(MODULES) - {"backend"}:  # its public names are those of elf_fast
        module = importlib.import_module(f"elf_fast.{name}")
        named |= {f"{module.__name__}.{public}" for public in module.__all__}
    return named


def documented() -> set[str]:
    """What the pages of the API name: modules, or names in them."""
    pages = (DOCS / "api").glob("*.md")
    return {n for page in pages for n in re.findall(r"^::: (\S+)$", page.read_text(), re.M)}


def test_every_page_is_in_the_nav_and_every_entry_of_the_nav_exists():
    found = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    outside = pages_outside_docs()
    assert len(outside) == 4 and all((ROOT / source).exists() for source in outside)
    entries = list(nav_pages(CONFIG["nav"]))
    assert len(entries) == len(set(entries))
    assert set(entries) == found | set(outside.values()), "nav of mkdocs.yml"


def test_every_public_name_has_a_page_of_the_api():
    known = documented()
    missing = {n for n in public_names() if n not in known and n.rpartition(".")[0] not in known}
    assert len(public_names()) > 60
    assert missing == set(), "name them in docs/api/"


def test_every_name_on_a_page_of_the_api_exists():
    assert len(documented()) > 15
    for name in documented():
        pkgutil.resolve_name(name)


def test_the_site_builds_and_shows_every_public_name(tmp_path):
    """A link, an anchor or a name that does not resolve ends a strict build."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    index = (tmp_path / "objects.inv").read_bytes().split(b"\n", 4)[4]
    shown = {line.split()[0] for line in zlib.decompress(index).decode().splitlines()}
    assert public_names() - shown == set(), "a name without a docstring is not shown"
    loaded = re.compile(r'<(?:script|link|img)[^>]+(?:src|href)="?(?:https?:)?//')
    assert [p.name for p in tmp_path.rglob("*.html") if loaded.search(p.read_text())] == []
