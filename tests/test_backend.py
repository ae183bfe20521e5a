"""Choosing the backend, and reporting it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import elf_fast
from elf_fast import functional, ops

NATIVE = elf_fast.report()["cpu"].startswith("cpu")


def run(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True
    )


def test_use_backend_switches_and_restores():
    before = elf_fast.report()
    with elf_fast.use_backend("torch"):
        assert elf_fast.report()["cpu"].startswith("torch")
        with elf_fast.use_backend("torch"):
            pass
        assert elf_fast.report()["cpu"].startswith("torch")
    assert elf_fast.report() == before


@pytest.mark.skipif(not NATIVE, reason="built without native CPU kernels")
def test_backends_are_really_different_kernels(monkeypatch):
    """Under "torch" the reference is called, under "cpu" it is not."""
    from elf_fast import reference

    calls = []
    real = reference.exit_gate
    monkeypatch.setattr(reference, "exit_gate", lambda *a, **k: calls.append(1) or real(*a, **k))
    x = torch.randn(4, 3)
    with elf_fast.use_backend("cpu"):
        functional.exit_gate(x, 0.5)
    assert not calls
    with elf_fast.use_backend("torch"):
        functional.exit_gate(x, 0.5)
    assert calls


def test_unknown_backends_are_refused():
    message = "backend: expected one of torch, cpu, cuda, triton"
    with pytest.raises(ValueError, match=message), elf_fast.use_backend("tpu"):
        pass


@pytest.mark.parametrize("name", ["cpu", "cuda", "triton"])
def test_backends_that_cannot_run_are_refused_with_the_reason(name, monkeypatch):
    before = elf_fast.report()
    monkeypatch.setitem(elf_fast.backend._unavailable, name, "it is a test")
    message = f"backend '{name}' cannot run: it is a test"
    with pytest.raises(RuntimeError, match=message), elf_fast.use_backend(name):
        pass
    monkeypatch.undo()
    assert elf_fast.report() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a CUDA device")
def test_without_a_gpu_cuda_cannot_run():
    message = "backend 'cuda' cannot run: "
    with pytest.raises(RuntimeError, match=message), elf_fast.use_backend("cuda"):
        pass


def test_a_chosen_backend_does_not_fall_back():
    """Every operator refuses a device that the chosen backend does not serve."""
    if not NATIVE:
        pytest.skip("built without native CPU kernels")

    def registered(name: str) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"elf_fast::{name}", "CUDA")

    before = [registered(name) for name in ops.SCHEMAS]
    with elf_fast.use_backend("cpu"):
        assert all(registered(name) for name in ops.SCHEMAS)
    assert [registered(name) for name in ops.SCHEMAS] == before
    kernel = elf_fast.backend._refusing("exit_gate", "cpu", "CUDA")
    with pytest.raises(RuntimeError, match="backend 'cpu' was chosen and cannot serve CUDA"):
        kernel()


def test_environment_variable():
    out = run("import elf_fast; print(elf_fast.report())", ELF_FAST_BACKEND="torch")
    assert "'chosen': 'torch'" in out.stdout, out.stderr
    out = run("import elf_fast", ELF_FAST_BACKEND="nonsense")
    assert out.returncode != 0 and "backend: expected one of" in out.stderr


@pytest.mark.skipif(not NATIVE, reason="built without native CPU kernels")
def test_unknown_isa_is_refused():
    code = "import torch; from elf_fast import functional as F; F.exit_gate(torch.randn(2, 3), 0.5)"
    out = run(code, ELF_FAST_ISA="sse9")
    assert "ELF_FAST_ISA: expected portable, avx2 or avx512, got sse9" in out.stderr


@pytest.mark.skipif(not NATIVE, reason="built without native CPU kernels")
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_narrower_instruction_sets_pass_the_same_tests(isa):
    """test_ops.py on the code for processors with narrower instruction sets."""
    probe = run("import torch; from elf_fast import functional as F;"
                "F.exit_gate(torch.randn(2, 3), 0.5)", ELF_FAST_ISA=isa)  # fmt: skip
    if "this processor does not have it" in probe.stderr:
        pytest.skip(f"no {isa} here")
    out = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "[cpu",
         os.path.join(os.path.dirname(__file__), "test_ops.py")],
        env=os.environ | {"ELF_FAST_ISA": isa}, capture_output=True, text=True,
    )  # fmt: skip
    assert out.returncode == 0, out.stdout[-3000:]
    assert " passed" in out.stdout


def test_import_is_quick():
    """elf_fast adds under 0.3 s to `import torch`."""
    code = (
        "import time, torch; t = time.perf_counter(); import elf_fast; "
        "print(time.perf_counter() - t)"
    )
    assert min(float(run(code).stdout) for _ in range(3)) < 0.3
