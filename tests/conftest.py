"""Devices and backends that can be tested on this machine, and common fixtures."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

# Without a GPU, Triton's interpreter runs its kernels on CPU tensors. Triton reads this when it is
# imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

#: Tests import benchmarks/ from here; last, so that an installed elf_fast comes before this one.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import emulated_cuda
from lost_device import pytest_runtest_logfinish  # noqa: F401

import elf_fast
from elf_fast import backend as backends

torch.set_num_threads(2)
torch.backends.cudnn.allow_tf32 = False  # the tests' tolerances are those of float32

if not torch.cuda.is_available() and backends._why_not("triton") is None:
    from elf_fast.kernels import row_state

    row_state.TILE *= 16  # fewer, larger programs: the interpreter's time grows with their number


def _serving() -> list[tuple[str, str]]:
    """(backend, device) pairs that can run on this machine."""
    pairs = [("torch", "cpu"), ("cpu", "cpu")]
    if torch.cuda.is_available():
        pairs += [("torch", "cuda"), ("cuda", "cuda"), ("triton", "cuda")]
    else:
        pairs.append(("triton", "cpu"))
    pairs = [pair for pair in pairs if backends._why_not(pair[0]) is None]
    if not torch.cuda.is_available() and emulated_cuda.compiler():
        pairs.append(("emulated cuda", "cpu"))
    return pairs


@contextlib.contextmanager
def _cuda_first() -> Iterator[None]:
    """CUDA C++ for every operator that it has, whatever the defaults are."""
    chosen = dict.fromkeys(backends.CUDA_CPP, ("cuda", "a test"))
    with mock.patch.dict(backends.CUDA_DEFAULT, chosen):
        backends._install(None)
        yield
    backends._install(None)


@pytest.fixture(params=_serving(), ids=lambda pair: "-".join(dict.fromkeys(pair)))
def device(request):
    """Every backend in turn; yields the device that it serves. "cuda" and "emulated cuda" leave
    operators without a CUDA C++ kernel to the default."""
    name, device = request.param
    named = {"cuda": _cuda_first, "emulated cuda": emulated_cuda.serving}
    with named[name]() if name in named else elf_fast.use_backend(name):
        yield device


@pytest.fixture(scope="session")
def demo_output(tmp_path_factory) -> tuple[Path, str]:
    """(folder, printed text) of a demo with one seed and two epochs."""
    from elf_fast import cli

    folder = tmp_path_factory.mktemp("demo") / "out"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.main(["demo", "--output", str(folder), "--seeds", "1", "--epochs", "2"]) == 0
    return folder, printed.getvalue()


@pytest.fixture(scope="module")
def recipe():
    """setup.py as a module."""
    setup = Path(__file__).resolve().parents[1] / "setup.py"
    spec = importlib.util.spec_from_file_location("elf_fast_setup", setup)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One CPU thread for torch, so that a small run is quick and repeats bit by bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits():
    """Long-tailed digits at imbalance 50."""
    return pytest.importorskip("elf_fast.data").long_tailed_digits(50.0)
