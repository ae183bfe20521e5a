"""What each part of the code may import: rooms stand on floors and import lower floors only.

The order below is that of docs/architecture.md; a new module is placed here before it lands.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

#: From the ground up. Rooms of one floor do not import each other, and a room imports lower floors
#: only. A name is a module or a folder of elf_fast/. "" is the package itself: what
#: elf_fast/__init__.py exports may be used through it only above it.
FLOORS = (
    ("atomic", "criteria", "digests", "memory", "modes", "timing", "weight_decay", "kernels"),
    ("checks",),
    ("console",),
    ("ranks", "exit_settings", "groups"),
    ("base", "heads"),
    ("reference",),
    ("ops",),
    ("backend",),
    ("arguments",),
    ("functional",),
    ("losses", "samplers", "flops", "tracing", "layouts"),
    ("modules", "metrics", "last_layers", "stages"),
    ("agreement",),
    ("classifiers", "models", "backbones"),
    ("inference",),
    ("",),
    ("data", "bench"),
    ("policy",),
    ("runs",),
    ("page",),
    ("training", "export", "serving", "demo"),
    ("cli",),
    ("__main__",),
)
#: The same inside folders; modules that are not named stand on the highest floor of their folder.
INSIDE = {
    "bench": (("workload",), ("inference", "training"), ("engines",), ("command",)),
    "cli": (("errors", "metrics", "flags", "interrupts"), ("prior",),
            ("advise", "bench", "calibrate", "demo", "doctor", "evaluate", "predict", "train"),
            ("main",), ("__init__", "__main__")),
    "data": (("splits", "images", "longtail"), ("preprocessing", "loader", "tree"), ("transforms",),
             ("cifar", "digits", "folder", "lists", "inputs"), ("__init__",)),
    "demo": (("loop", "summary", "throughput"), ("page",), ("run",)),
    "inference": (("folding", "packing", "parts", "frozen", "report", "request", "stage_times",
                   "refill", "prometheus"),
                  ("code", "exits", "cache", "queues", "counters"), ("choice", "engine", "core"),
                  ("compiling",), ("scheduler",), ("__init__",)),
    "page": (("markup", "estimates"), ("plots", "speed"), ("sections", "evaluated"),
             ("tradeoff", "compare", "evaluating"), ("run",)),
    "policy": (("logits", "reading", "guarantee"), ("artefact", "exit_table"),
               ("one_number", "measure", "search", "shares", "temperatures", "cells", "costs",
                "drift"),
               ("wanted",), ("certify",), ("calibration", "monitor", "advise"), ("__init__",)),
    "runs": (("strict_yaml", "lock", "demo_network", "class_weights"), ("values", "files"),
             ("config", "checkpoints", "description"), ("plain", "datasets", "freezing"),
             ("networks", "evaluation", "observation", "contents"), ("building", "card"),
             ("opening", "saving", "predict"), ("loading", "initial", "measured")),
    "training": (("processes", "ema", "schedule", "log", "mixing"),
                 ("progress", "learner", "stopping"), ("resume", "results", "unreadable"),
                 ("folder",), ("trainer", "config")),
}  # fmt: skip
DATA_MAY_IMPORT = {"checks", "criteria", "data", "memory"}
KERNELS_MAY_IMPORT = {"torch", "triton", *sys.stdlib_module_names}


def floor_of(floors: tuple, name: str) -> int | None:
    return next((i for i, floor in enumerate(floors) if name in floor), None)


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


def parts_inside(module: str) -> tuple[str, ...] | None:
    """The names below elf_fast of a dotted name; None for a name outside."""
    first, *rest = module.split(".")
    return tuple(rest) if first == "elf_fast" else None


def violations(root: Path) -> list[str]:
    """Every import in elf_fast/ that goes up or sideways, and every module without a place."""
    package = root / "elf_fast"
    found = []
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).with_suffix("").parts
        if parts == ("__init__",):
            continue
        where = file.relative_to(root).as_posix()
        if floor_of(FLOORS, parts[0]) is None:
            found.append(f"{where}: {parts[0]!r} has no place in FLOORS")
            continue
        for line, name in imports(file, ".".join(("elf_fast", *parts[:-1]))):
            other = parts_inside(name)
            if other is not None and not is_allowed(parts, other):
                found.append(f"{where}:{line}: imports {shown(parts, other)!r}")
    return found


def shown(own: tuple[str, ...], other: tuple[str, ...]) -> str:
    """How a message names what the module `own` imports."""
    if not other or floor_of(FLOORS, other[0]) is None:
        return "the package itself"
    return ".".join(other[:2] if other[0] == own[0] else other[:1])


def is_allowed(own: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Whether the module `own` may import `other`, both by their names below elf_fast."""
    known = other[:1] if other and floor_of(FLOORS, other[0]) is not None else ("",)
    if known != own[:1]:
        return floor_of(FLOORS, known[0]) < floor_of(FLOORS, own[0])
    inside = INSIDE.get(own[0])
    if inside is None or len(own) < 2 or len(other) < 2:
        return True
    floors = [floor_of(inside, name) for name in (own[1], other[1])]
    if floors[1] is None:  # a name of the folder's __init__, which imports nothing above it
        return True
    return own[1] == other[1] or floors[0] is None or floors[1] < floors[0]


def test_modules_import_only_lower_floors():
    assert violations(ROOT) == []


def test_every_module_has_a_floor_and_every_floor_has_modules():
    """Except floors for rooms that do not exist yet."""
    package = ROOT / "elf_fast"
    lived_in = {path.stem for path in package.iterdir() if path.suffix == ".py" or path.is_dir()}
    to_come = {"", "kernels", "inference", "export", "serving"}
    assert {name for floor in FLOORS for name in floor} - lived_in <= to_come
    for folder, floors in INSIDE.items():
        modules = {path.stem for path in (package / folder).glob("*.py")} - {"__init__"}
        assert {name for floor in floors for name in floor} - {"__init__"} == modules, folder


@pytest.mark.parametrize(
    "file, source, refused",
    [
        ("ops.py", "from . import modules", "'modules'"),
        ("ops.py", "import elf_fast.cli", "'cli'"),
        ("ops.py", "from .reference import ELF", None),
        ("losses.py", "from . import ELF", "'the package itself'"),
        ("cli/x.py", "from .. import ELF", None),
        ("training/a.py", "from ..cli import main", "'cli'"),
        ("training/a.py", "from ..data import folder; from ..models import cut", None),
        ("training/a.py", "from ..demo import run", "'demo'"),
        ("serving/a.py", "from ..export.b import c", "'export'"),
        ("inference/a.py", "from ..training import b", "'training'"),
        ("runs/files.py", "from .opening import read", "'runs.opening'"),
        ("runs/opening.py", "from .files import load", None),
        ("runs/plain.py", "from . import networks", "'runs.networks'"),
        ("runs/datasets.py", "from .plain import a", "'runs.plain'"),
    ],
)
def test_the_rule_is_enforced(tmp_path, file, source, refused):
    path = tmp_path / "elf_fast" / file
    path.parent.mkdir(parents=True)
    path.write_text(f"def f():\n    {source}", encoding="utf-8")
    assert violations(tmp_path) == ([f"elf_fast/{file}:2: imports {refused}"] if refused else [])


def test_a_module_without_a_place_is_named(tmp_path):
    (tmp_path / "elf_fast").mkdir()
    (tmp_path / "elf_fast" / "speed.py").write_text("import torch")
    assert violations(tmp_path) == ["elf_fast/speed.py: 'speed' has no place in FLOORS"]


def imported_by(folder: Path, package: str) -> list[tuple[str, str]]:
    """(place, dotted name) of everything that the modules of a folder import."""
    found = [
        (f"{file.name}:{line}", name)
        for file in sorted(folder.rglob("*.py"))
        for line, name in imports(file, package)
    ]
    assert len(found) > 10, f"{folder} holds no modules"
    return found


def test_data_knows_no_model_and_no_kernel():
    found = imported_by(ROOT / "elf_fast" / "data", "elf_fast.data")
    inside = [(place, name) for place, name in found if parts_inside(name) is not None]
    assert [
        at for at in inside if at[1].split(".")[1:2] not in ([m] for m in DATA_MAY_IMPORT)
    ] == []


def test_kernels_import_torch_and_triton_only():
    found = imported_by(ROOT / "kernels", "elf_fast.kernels")
    outside = [at for at in found if not at[1].startswith("elf_fast.kernels")]
    assert [at for at in outside if at[1].split(".")[0] not in KERNELS_MAY_IMPORT] == []


def test_native_code_includes_no_header_of_python():
    header = re.compile(r'#\s*include\s*[<"]((?:Python\.h|pybind11/|torch/extension|ATen/)[^>"]*)')
    files = [f for f in sorted((ROOT / "csrc").rglob("*.*")) if "runtime" not in f.parts]
    included = {f.name: header.findall(f.read_text(encoding="utf-8")) for f in files}
    assert {"exit_gate.cu", "criterion.h"} <= included.keys()
    assert {name: found for name, found in included.items() if found} == {}
    assert header.findall("#include <Python.h>\n# include <ATen/ATen.h>")


def private_uses(file: Path, package: str) -> Iterator[tuple[int, str]]:
    """(line, name) of every private name of another module of this project that a file imports, or
    reads as an attribute of an imported module."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            inside = node.level > 0 or (node.module or "").split(".")[0] in OURS
            for alias in node.names if inside else ():
                if is_private(alias.name):
                    yield node.lineno, alias.name
                modules.add(alias.asname or alias.name)
        elif isinstance(node, ast.Import):
            modules |= {a.asname or a.name for a in node.names if a.name.split(".")[0] in OURS}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = ast.unparse(node.value)
            if owner in modules and not owner[:1].isupper():  # a class uses its own
                yield node.lineno, f"{owner}.{node.attr}"


#: Packages of this project.
OURS = ("elf_fast", "benchmarks", "kernels")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_no_module_uses_a_private_name_of_another():
    found = []
    for folder in OURS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            package = ".".join(file.relative_to(ROOT).parts[:-1])
            where = file.relative_to(ROOT).as_posix()
            found += [f"{where}:{line}: {name}" for line, name in private_uses(file, package)]
    assert found == []


@pytest.mark.parametrize(
    "source, uses",
    [
        ("from .reference import _add", ["_add"]),
        ("from . import functional\nfunctional._call()", ["functional._call"]),
        ("import elf_fast.ops as o\no._fake", ["o._fake"]),
        ("from torch.nn.modules.batchnorm import _BatchNorm\nimport torch\ntorch._C", []),
        ("from . import ops\nops.exit_gate\nself._own", []),
    ],
)
def test_private_names_are_seen(tmp_path, source, uses):
    file = tmp_path / "a.py"
    file.write_text(source)
    assert [name for _, name in private_uses(file, "elf_fast")] == uses


def test_importing_the_trainer_imports_neither_the_demo_nor_matplotlib():
    code = (
        "import sys, elf_fast.training.trainer\n"
        "loaded = [m for m in sys.modules if m.startswith(('elf_fast.demo', 'matplotlib'))]\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
