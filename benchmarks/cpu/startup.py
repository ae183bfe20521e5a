"""How long `import elf_fast` takes after `import torch`, and a build from source. The baselines are
the times that they may take.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from elf_fast.timing import Quartiles

from ..row import Row

ROOT = Path(__file__).resolve().parents[2]
IMPORT = (
    "import time, torch; t = time.perf_counter(); import elf_fast; print(time.perf_counter() - t)"
)


def rows(*, full: bool) -> Iterator[Row]:
    seconds = [_import() for _ in range(9)]
    yield _row("import elf_fast", "after import torch", seconds, 0.3)
    modes = {"cpu": 60.0, **({"cuda": 300.0} if shutil.which("nvcc") else {})}
    for mode, most in modes.items() if full else ():
        taken = [_build(mode) for _ in range(2)]
        yield _row(f"build, ELF_FAST_BUILD={mode}", "from source", taken, most)


def _import() -> float:
    """Seconds of the import in a new process."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], check=True, capture_output=True, text=True
    )
    return float(done.stdout)


def _build(mode: str) -> float:
    """Seconds of compiling and linking, without any earlier object file."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("csrc", "elf_fast", "kernels"):
            ignored = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / name, Path(folder) / name, ignore=ignored)
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder)
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], check=True, cwd=folder,
            env=os.environ | {"ELF_FAST_BUILD": mode}, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        return time.perf_counter() - start


def _row(subject: str, shape: str, seconds: Sequence[float], most: float) -> Row:
    needs = Quartiles.of(seconds)
    ratio = Quartiles.of([most / s for s in seconds])
    times = {
        "subject": Quartiles(*(1e6 * s for s in needs)),
        "baseline": Quartiles(*3 * [1e6 * most]),
    }
    row = Row("startup", subject, f"{most:g} s allowed", shape, ratio, 1.0, times)
    print(row.line(), flush=True)
    return row
