"""What the modules of benchmarks/ may import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "benchmarks").rglob("*.py"))
OF_TESTS = {path.stem for path in (ROOT / "tests").rglob("*.py")} | {"tests"}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_imports(file):
    """Nothing of tests/, no private name of another module, and no change of the module path."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    own = [node for node in imports if isinstance(node, ast.ImportFrom) and node.level]
    others = [
        alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names
    ]
    others += [
        node.module for node in imports if isinstance(node, ast.ImportFrom) and not node.level
    ]
    assert not {name.split(".")[0] for name in others} & (OF_TESTS | {"benchmarks"})
    names = {alias.asname or alias.name for node in own for alias in node.names}
    assert not [name for name in names if name.startswith("_")]
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    for node in attributes:
        if isinstance(node.value, ast.Name):
            assert not (node.value.id in names and node.attr.startswith("_")), ast.unparse(node)
            assert (node.value.id, node.attr) != ("sys", "path")


def test_gpu_check_starts_without_torch_and_elf_fast():
    """It runs before the package is built."""
    code = "import sys, benchmarks.gpu.check; print({'torch', 'elf_fast'} & sys.modules.keys())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
