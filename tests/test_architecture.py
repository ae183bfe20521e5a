"""Files that docs/architecture.md and CONTRIBUTING.md name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: Where a path of the pages may start.
FROM = (ROOT, ROOT / "elf_fast")


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md", "README.md"])
def test_files_that_a_page_names_exist(page):
    named = set(re.findall(r"[\w./-]+\.(?:py|cpp|cu|h|inl|md|json|png)\b", text(page)))
    named = {
        name.removeprefix("../") for name in named if not re.search(r"NAME|\b(test_)?[XY]\.", name)
    }
    folders = (*FROM, ROOT / "docs", *[f for f in (ROOT / "elf_fast").iterdir() if f.is_dir()])
    missing = {n for n in named if not any((folder / n).exists() for folder in folders)}
    assert missing == set() and len(named) > 5


def test_functions_that_the_architecture_names_exist():
    found = re.findall(r"`(\w[\w/]*\.py): (\w[\w.]*)`", text("docs/architecture.md"))
    assert len(found) >= 10
    for file, name in found:
        source = (ROOT / "elf_fast" / file).read_text(encoding="utf-8")
        for part in name.split("."):
            is_there = re.search(rf"(def|class) {part}\b|^{part}\b.*=", source, re.MULTILINE)
            assert is_there, f"{file}: {name}"
