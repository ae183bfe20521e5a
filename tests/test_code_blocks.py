"""Commands and Python code on the pages name what exists. Examples that run: test_docs.py."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import parsed

import elf_fast
from elf_fast.cli.main import parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def code(text: str) -> Iterator[str]:
    """Lines of a page's code blocks, continued lines as one and without comments, and its inline
    code."""
    for language, block in _BLOCK.findall(text):
        if language in ("", "sh", "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                yield re.sub(r"(^|\s)#.*", "", line)
    yield from re.findall(r"`([^`\n]+)`", _BLOCK.sub("", text))


def commands(text: str) -> list[list[str]]:
    """Arguments of every `elf-fast` on a page; "..." stands for more of them."""
    found = [re.search(r"(?:^|[\s/])(?:elf-fast|elf_fast\.cli) (.*)", line) for line in code(text)]
    return [shlex.split(at[1].replace(" ...", "")) for at in found if at]


def check_command(arguments: list[str]) -> None:
    """Raises if `elf-fast` has no such command or flag, or the flag does not take the value."""
    command, *given = arguments
    if command == "train":
        if given[:1] == ["--resume"]:
            del given[:2]
        parsed("--data-dir", "any", *(flag for flag in given if flag != "--help"))
    try:
        parser().parse_args(arguments if given else [command, "--help"])
    except SystemExit as ended:
        if ended.code:
            raise ValueError(f"elf-fast {' '.join(arguments)}") from ended


def names_of(tree: ast.AST) -> dict[str, Any]:
    """What a block imports of this package and of torch; pages may leave out these two."""
    names: dict[str, Any] = {"elf_fast": elf_fast, "torch": torch}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(tuple(names)):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
                names[alias.asname or alias.name] = getattr(module, alias.name)
    return names


def resolved(node: ast.expr, names: dict[str, Any]) -> Any:
    """The object that a dotted name stands for; None if the name is a variable of the block."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    owner = resolved(node.value, names) if isinstance(node, ast.Attribute) else None
    return None if owner is None else getattr(owner, node.attr)


def check_python(block: str) -> None:
    """Raises if a block does not compile, or names or calls what does not exist."""
    tree = ast.parse(block)
    names = names_of(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            resolved(node, names)
        called = resolved(node.func, names) if isinstance(node, ast.Call) else None
        if getattr(called, "__module__", "").startswith("elf_fast"):
            keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            inspect.signature(called).bind_partial(*(None for _ in node.args), **keywords)


@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if commands(text)])
def test_commands_and_flags_exist(page):
    for arguments in commands(TEXTS[page]):
        check_command(arguments)


@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if "```python" in text])
def test_python_names_what_exists(page):
    for language, block in _BLOCK.findall(TEXTS[page]):
        if language == "python":
            check_python(block)


def test_targets_of_make_and_modules_exist():
    lines = [line for text in TEXTS.values() for line in code(text)]
    targets = {t for line in lines for t in re.findall(r"^make ([a-z-]+)", line)}
    modules = {m for line in lines for m in re.findall(r"-m (benchmarks[\w.]*)", line)}
    known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert len(targets) >= 6 and targets <= set(known)
    paths = {ROOT / module.replace(".", "/") for module in modules}
    assert len(paths) >= 8
    assert {p for p in paths if not p.is_dir() and not p.with_suffix(".py").exists()} == set()


def test_commands_are_seen():
    assert sum(len(commands(text)) for text in TEXTS.values()) >= 20
    text = "`elf-fast eval X`\n```\nelf-fast train \\\n  --lr 1 # elf-fast demo\n```\n"
    assert commands(text) == [["train", "--lr", "1"], ["eval", "X"]]


@pytest.mark.parametrize(
    "line",
    ["evaluate RUN", "eval RUN --jason", "train --lr x", "train --loss no", "bench --size x"],
)
def test_wrong_commands_are_seen(line):
    with pytest.raises((TypeError, ValueError, SystemExit)):
        check_command(line.split())


@pytest.mark.parametrize(
    "block",
    ["x = (", "from elf_fast import loses", "elf_fast.losses.LDAM([1])", "torch.nn.Linnear(1, 2)",
     "from elf_fast import data\ndata.cifar_lt('x', 10, imbalances=3)",
     "from elf_fast.losses import log_prior\nlog_prior([1], 2)"],
)  # fmt: skip
def test_wrong_python_is_seen(block):
    with pytest.raises((SyntaxError, ImportError, AttributeError, TypeError)):
        check_python(block)
