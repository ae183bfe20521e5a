"""Builds of one source in two folders are equal. A rank that stands still is heard of."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import zipfile
from datetime import timedelta
from pathlib import Path

import processes
import torch

from elf_fast.training import processes as joining

ROOT = Path(__file__).resolve().parents[2]


def compiled(recipe, source: Path, out: Path, *flags: str) -> bytes:
    command = [*recipe.find_compiler().split(), *recipe.CXX_FLAGS, "-O0", "-fPIC", *flags]
    subprocess.run([*command, str(source), "-o", str(out)], check=True)
    return out.read_bytes()


def test_names_of_files_in_two_folders_are_equal(recipe, tmp_path, monkeypatch):
    """Messages of checks in sources and in torch's headers hold them."""
    built = []
    for name in ("a", "a longer name"):
        source = tmp_path / name / "csrc" / "cpu" / "a.cpp"
        header = tmp_path / f"environment of {name}" / "torch" / "b.h"
        for file in (source, header):
            file.parent.mkdir(parents=True)
        (source.parent.parent / "c.h").write_text("inline const char* c() { return __FILE__; }")
        header.write_text("inline const char* b() { return __FILE__; }")
        names = f'#include "../c.h"\n#include "{header}"\n'
        source.write_text(f"{names}const char* a[] = {{__FILE__, b(), c()}};")
        monkeypatch.chdir(tmp_path / name)
        monkeypatch.setattr(torch, "__file__", str(header.parent / "__init__.py"))
        maps = recipe.prefix_maps(torch)
        built.append(compiled(recipe, source, tmp_path / name / "a.o", "-c", *maps))
    assert built[0] == built[1] and str(tmp_path).encode() not in built[0]
    assert b"./csrc/cpu/a.cpp" in built[0] and b"torch/b.h" in built[0]


def test_libraries_are_built_with_mapped_names(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("MAX_JOBS", "PATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    (library,) = recipe.native("cpu")["ext_modules"]
    flags = library.extra_compile_args
    assert f"-ffile-prefix-map={ROOT}=." in flags["cxx"]
    assert f"-Xcompiler=-ffile-prefix-map={ROOT}=." in flags["nvcc"]


def test_the_files_of_a_wheel_have_the_time_of_the_sources(tmp_path):
    """Not that of the build, which differs between two builds of one archive."""
    keep = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for part in ("elf_fast", "kernels"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=keep)
    for part in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy2(ROOT / part, tmp_path / part)
    os.utime(tmp_path / "setup.py", (0, 1_500_000_000))
    environment = {k: v for k, v in os.environ.items() if k != "SOURCE_DATE_EPOCH"}
    subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel"], cwd=tmp_path, check=True,
        env={**environment, "ELF_FAST_BUILD": "none"}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(2017, 7, 14, 2, 40, 0)}


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
