"""The one place that loads native code and decides which kernels serve.

Every operator has a reference kernel (`ops.py`). Native kernels for a device take its place when
their library loads; `use_backend` and ELF_FAST_BACKEND choose on purpose, and a choice that cannot
run raises instead of falling back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from . import ops

BACKENDS = ("torch", "cpu", "cuda", "triton")
_DEVICE_KEYS = ("CPU", "CUDA")

#: Native library by backend, and why it does not serve (None: it does).
_LIBRARIES = {"cpu": "_native_cpu", "cuda": "_native_cuda"}
_unavailable: dict[str, str | None] = {}

_chosen: str | None = None
_override: torch.library.Library | None = None


def _load(backend: str) -> str | None:
    stem = _LIBRARIES[backend]
    found = sorted(Path(__file__).parent.glob(f"{stem}*.so"))
    if not found:
        if backend == "cuda":
            return "this build of elf_fast has no CUDA kernels"
        return "elf_fast was built without its CPU library; reinstall with ELF_FAST_BUILD=cpu"
    if backend == "cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"{found[0].name} does not load: {error.__cause__ or error}"
    return None


def _why_not(backend: str) -> str | None:
    """The reason that a backend cannot serve, or None."""
    if backend == "torch":
        return None
    if backend == "triton":
        return "this version of elf_fast has no Triton kernels"
    return _unavailable[backend]


def _refusing(name: str, backend: str, key: str):
    def kernel(*args, **kwargs):
        raise RuntimeError(
            f"elf_fast.{name}: backend {backend!r} was chosen and cannot serve {key} tensors"
        )

    return kernel


def _choose(backend: str | None) -> None:
    global _chosen, _override
    if backend is not None:
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
        reason = _why_not(backend)
        if reason is not None:
            raise RuntimeError(f"backend {backend!r} cannot run: {reason}")
    if _override is not None:
        _override._destroy()
        _override = None
    _chosen = backend
    if backend is None:
        return
    _override = torch.library.Library("elf_fast", "IMPL")
    for key in _DEVICE_KEYS:
        if backend == "torch":
            ops.register_reference(_override, key, allow_override=True)
        elif key.lower() != backend:
            for name in ops.SCHEMAS:
                _override.impl(name, _refusing(name, backend, key), key, allow_override=True)


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Serve every operator from one backend inside the block, for tests and benchmarks.

    backend: "torch" (the reference), "cpu", "cuda" or "triton". The choice holds for the whole
    process, not for one thread.

    Raises:
        ValueError: no such backend. RuntimeError: it cannot run here (the message says why), or,
        inside the block, it is asked to serve tensors of another device.
    """
    before = _chosen
    _choose(backend)
    try:
        yield
    finally:
        _choose(before)


def report() -> dict[str, str]:
    """What serves CPU and CUDA tensors, and why; the keys are "cpu", "cuda" and "chosen"."""
    lines = {"chosen": _chosen or "none: the fastest that is there"}
    for key in _DEVICE_KEYS:
        device = key.lower()
        reason = _why_not(device)
        if _chosen == "torch":
            lines[device] = "torch (plain PyTorch): chosen"
        elif _chosen is not None and _chosen != device:
            lines[device] = f"nothing: backend {_chosen!r} was chosen"
        elif reason is None:
            lines[device] = f"{device} (native kernels)"
        else:
            lines[device] = f"torch (plain PyTorch): {reason}"
    return lines


for _backend in _LIBRARIES:
    _unavailable[_backend] = _load(_backend)
if os.environ.get("ELF_FAST_BACKEND"):
    _choose(os.environ["ELF_FAST_BACKEND"])
