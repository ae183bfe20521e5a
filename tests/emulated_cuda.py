"""The CUDA C++ kernels on the CPU: csrc/cuda compiled as C++ against `cuda_on_cpu/`.

The library registers its operators for CUDA, as usual. `serving()` dispatches CPU tensors to them.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from elf_fast import backend

ROOT = Path(__file__).resolve().parents[1]
#: The folder of the sources. test_mutations.py sets it to a changed copy of csrc/.
SOURCES = Path(os.environ.get("EMULATED_CUDA_SOURCES", ROOT / "csrc"))
TORCH = Path(torch.__file__).parent
FLAGS = """-x c++ -std=c++20 -O1 -fPIC -fvisibility=hidden -fno-strict-aliasing -Wno-unknown-pragmas
 -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020b000000000000 -include cuda_runtime.h""".split()


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++")


def build(folder: Path) -> Path:
    """Compiles all cuda/*.cu into one library and returns its path."""
    objects, compiling = [], []
    for source in sorted((SOURCES / "cuda").glob("*.cu")):
        objects.append(str(folder / f"{source.stem}.o"))
        command = [
            *(compiler() or "g++").split(), *FLAGS, f"-I{ROOT}/tests/cuda_on_cpu",
            f"-isystem{TORCH}/include", "-c", str(source), "-o", objects[-1],
        ]  # fmt: skip
        compiling.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for process in compiling:
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-4000:]
    library = folder / "emulated_cuda.so"
    command = [*(compiler() or "g++").split(), "-shared", *objects, "-o", str(library),
               f"-L{TORCH}/lib", "-ltorch_cpu"]  # fmt: skip
    subprocess.run(command, check=True)
    return library


@functools.cache
def _load() -> None:
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    torch.ops.load_library(str(build(Path(folder))))


@contextlib.contextmanager
def serving() -> Iterator[None]:
    """Serves CPU tensors with the emulated kernels inside the block."""
    _load()
    with contextlib.ExitStack() as stack:
        library = torch.library.Library("elf_fast", "IMPL")
        stack.callback(library._destroy)
        cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        for name in backend.CUDA_CPP:
            op = getattr(torch.ops.elf_fast, name).default
            library.impl(name, functools.partial(op.redispatch, cuda), "CPU", allow_override=True)
        yield
