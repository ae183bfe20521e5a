"""What each part of the code may know: a module imports only layers to its left.

The order below is the one in docs and reviews; a new module is placed here before it lands.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

#: From left to right; modules of one layer do not import each other. "" is the package itself:
#: what elf_fast/__init__.py exports may be used through it only to its right. A folder is one
#: layer with all that is in it.
LAYERS = (
    ("checks", "modes", "kernels"),
    ("ranks",),
    ("reference",),
    ("ops",),
    ("backend",),
    ("functional",),
    ("losses", "samplers", "flops"),
    ("modules", "classifiers", "metrics"),
    ("models", "backbones"),
    ("",),
    ("data", "bench"),
    ("training", "inference"),
    ("cli",),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
DATA_MAY_IMPORT = {"checks", "data"}
KERNELS_MAY_IMPORT = {"torch", "triton", *sys.stdlib_module_names}


def imports(path: Path, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports; `package` is the one it lies in."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *base.split(".")])
            for alias in node.names:
                yield node.lineno, f"{base.rstrip('.')}.{alias.name}"


def layer(module: str, known: set[str]) -> str | None:
    """The layer of a dotted name inside elf_fast; None for a name outside."""
    parts = module.split(".")
    if parts[0] != "elf_fast":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in known else ""


def violations(root: Path) -> list[str]:
    """Every import in elf_fast/ that goes to the right, and every module without a place."""
    package = root / "elf_fast"
    files = sorted(package.rglob("*.py"))
    known = {f.relative_to(package).parts[0].removesuffix(".py") for f in files} | set(RANK)
    found = []
    for file in files:
        parts = file.relative_to(package).parts
        if parts == ("__init__.py",):
            continue
        own = parts[0].removesuffix(".py")
        where = file.relative_to(root).as_posix()
        if own not in RANK:
            found.append(f"{where}: {own!r} has no place in LAYERS")
            continue
        for line, name in imports(file, ".".join(("elf_fast", *parts[:-1]))):
            other = layer(name, known)
            if other is None or other == own:
                continue
            if RANK.get(other, len(LAYERS)) >= RANK[own]:
                found.append(f"{where}:{line}: imports {other or 'the package itself'!r}")
    return found


def test_modules_import_only_to_their_left():
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    "file, source, expected",
    [
        ("ops.py", "from . import modules", "elf_fast/ops.py:1: imports 'modules'"),
        ("ops.py", "def f():\n    import elf_fast.cli", "elf_fast/ops.py:2: imports 'cli'"),
        ("ops.py", "from .reference import ELF", None),
        ("losses.py", "from . import ELF", "elf_fast/losses.py:1: imports 'the package itself'"),
        ("cli.py", "from . import ELF", None),
        (
            "training/loop.py",
            "from ..cli import main",
            "elf_fast/training/loop.py:1: imports 'cli'",
        ),
        ("training/a.py", "from .data import folder\nfrom ..models import cut", None),
        ("speed.py", "import torch", "elf_fast/speed.py: 'speed' has no place in LAYERS"),
    ],
)
def test_the_rule_is_enforced(tmp_path, file, source, expected):
    path = tmp_path / "elf_fast" / file
    path.parent.mkdir(parents=True)
    path.write_text(source, encoding="utf-8")
    assert violations(tmp_path) == ([expected] if expected else [])


def test_data_knows_no_model_and_no_kernel():
    for file in sorted((ROOT / "elf_fast" / "data").glob("*.py")):
        for line, name in imports(file, "elf_fast.data"):
            assert layer(name, set(RANK)) in {None, *DATA_MAY_IMPORT}, (
                f"{file.name}:{line}: imports {name}"
            )


def test_kernels_import_torch_and_triton_only():
    for file in sorted((ROOT / "kernels").rglob("*.py")):
        for line, name in imports(file, "elf_fast.kernels"):
            own = name.startswith("elf_fast.kernels")
            assert own or name.split(".")[0] in KERNELS_MAY_IMPORT, (
                f"{file.name}:{line}: imports {name}"
            )


def test_native_code_knows_no_python():
    header = re.compile(r'#\s*include\s*[<"]((?:Python\.h|pybind11/|torch/extension|ATen/)[^>"]*)')
    for file in sorted((ROOT / "csrc").rglob("*.*")):
        if "runtime" not in file.parts:
            found = header.findall(file.read_text(encoding="utf-8"))
            assert not found, f"{file.relative_to(ROOT)} includes {', '.join(found)}"
