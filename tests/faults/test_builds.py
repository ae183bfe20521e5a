"""Builds of one source in two folders are equal. A rank that stands still is heard of."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import processes
import pytest
import torch

from elf_fast.training import processes as joining

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def recipe():
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("elf_fast_setup_faults", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiled(recipe, source: Path, out: Path, *flags: str) -> bytes:
    command = [*recipe.find_compiler().split(), *recipe.CXX_FLAGS, "-O0", "-fPIC", *flags]
    subprocess.run([*command, str(source), "-o", str(out)], check=True)
    return out.read_bytes()


def test_names_of_files_in_two_folders_are_equal(recipe, tmp_path, monkeypatch):
    """Messages of checks in sources and in torch's headers hold them."""
    built = []
    for name in ("a", "a longer name"):
        source = tmp_path / name / "csrc" / "cpu" / "a.cpp"
        source.parent.mkdir(parents=True)
        (tmp_path / name / "torch").mkdir()
        (source.parent.parent / "a.h").write_text("inline const char* b() { return __FILE__; }")
        (tmp_path / name / "torch" / "c.h").write_text("static const char* c = __FILE__;")
        text = '#include "../a.h"\n#include "../../torch/c.h"\nauto d() { return b() + *c; }'
        source.write_text(text + " auto e() { return __FILE__; }")
        monkeypatch.chdir(tmp_path / name)
        monkeypatch.setattr(torch, "__file__", str(tmp_path / name / "torch" / "__init__.py"))
        maps = recipe.prefix_maps(torch)
        built.append(compiled(recipe, source, tmp_path / name / "a.o", "-c", *maps))
    assert built[0] == built[1] and str(tmp_path).encode() not in built[0]
    assert b"./csrc/cpu/a.cpp" in built[0]


def test_libraries_are_built_with_mapped_names(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("MAX_JOBS", "PATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    (library,) = recipe.native("cpu")["ext_modules"]
    flags = library.extra_compile_args
    assert f"-ffile-prefix-map={ROOT}=." in flags["cxx"]
    assert f"-Xcompiler=-ffile-prefix-map={ROOT}=." in flags["nvcc"]


def test_wheels_of_two_folders_and_times_are_equal(tmp_path):
    built = []
    for name in ("a", "b"):
        folder = tmp_path / name
        keep = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
        for part in ("elf_fast", "kernels"):
            shutil.copytree(ROOT / part, folder / part, ignore=keep)
        for part in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
            shutil.copy2(ROOT / part, folder / part)
        environment = {k: v for k, v in os.environ.items() if k != "SOURCE_DATE_EPOCH"}
        built.append(
            subprocess.Popen(
                [sys.executable, "setup.py", "-q", "bdist_wheel"], cwd=folder,
                env={**environment, "ELF_FAST_BUILD": "none"}, stderr=subprocess.DEVNULL,
            )
        )  # fmt: skip
        time.sleep(2.1)  # archives keep times in steps of two seconds
    assert [process.wait() for process in built] == [0, 0]
    first, second = (next((tmp_path / name / "dist").glob("*.whl")) for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def wait_for_a_rank_that_stands_still(folder: Path) -> None:
    joining.TIMEOUT = timedelta(seconds=1)
    with joining.joined("cpu") as joined:
        if joined.is_first:
            joined.gather(None)
        else:
            time.sleep(60)


def test_a_rank_that_stands_still_is_heard_of(tmp_path):
    assert timedelta(minutes=1) <= joining.TIMEOUT <= timedelta(minutes=15)
    first, second = processes.start(2, wait_for_a_rank_that_stands_still, tmp_path)
    first.join(30)
    code = first.exitcode
    processes.kill([first, second])
    assert code == 1
