"""Loads native code and decides which kernels serve each operator; no other module does.

Every operator has a reference kernel (`ops.py`). Native kernels for a device replace it when they
load. `use_backend` and ELF_FAST_BACKEND choose a backend explicitly; one that cannot run raises
instead of falling back.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from . import ops

BACKENDS = ("torch", "cpu", "cuda", "triton")
_DEVICE_KEYS = ("CPU", "CUDA")

#: Operators with a CUDA C++ kernel (`csrc/cuda`), and the Triton module of each (`kernels/`).
CUDA_CPP = ("exit_gate", "compact", "compact_into", "compact_", "compact_backward")
TRITON = {
    "exit_gate": "exit_gate",
    "exit_head": "exit_head",
    "compact": "compact",
    "compact_into": "compact",
    "compact_": "compact",
    "compact_backward": "compact",
    "exit_loss": "exit_loss",
    "exit_loss_backward": "exit_loss",
}

#: The default backend on CUDA of each operator that both backends have, and the benchmark row that
#: decided it. There is no GPU result yet: CUDA C++ serves the inference path because its exit_gate
#: needs one launch where Triton's needs two, and its launches run no Python.
CUDA_DEFAULT = {
    "exit_gate": ("cuda", "no GPU result yet"),
    "compact": ("cuda", "no GPU result yet"),
    "compact_into": ("cuda", "no GPU result yet"),
    "compact_": ("cuda", "no GPU result yet"),
    "compact_backward": ("cuda", "no GPU result yet"),
}

#: Native library by backend.
_LIBRARIES = {"cpu": "_native_cpu", "cuda": "_native_cuda"}
#: Why a backend cannot be used; None if it can.
_unavailable: dict[str, str | None] = {"torch": None}

#: The functions through which every call of an operator from Python goes.
_CALLS = {torch._ops.OpOverload.__call__.__code__, torch._ops.OpOverloadPacket.__call__.__code__}
#: Seconds that `use_backend` waits for the calls of other threads to end.
_PATIENCE = 10.0
#: Seconds that a thread which wants to run Python has to wait while kernels are replaced. It waits
#: as long even if the block ends sooner.
_HOLD = 0.1
#: One thread at a time replaces kernels.
_replacing = threading.Lock()

_chosen: str | None = None
_override: torch.library.Library | None = None


def _use_kernels_beside_package() -> None:
    """Makes `elf_fast.kernels` the folder kernels/ of the source tree that this file lies in.

    An installed package contains its kernels. In a source tree they lie beside the package; without
    this function, an editable install of another tree would supply them.
    """
    package = Path(__file__).parent
    if (package / "kernels").is_dir():
        return
    source = package.parent / "kernels" / "__init__.py"
    name = f"{__package__}.kernels"
    spec = importlib.util.spec_from_file_location(
        name, source, submodule_search_locations=[str(source.parent)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = sys.modules[__package__].kernels = module  # type: ignore[attr-defined]


def _load(backend: str) -> str | None:
    stem = _LIBRARIES[backend]
    found = sorted(Path(__file__).parent.glob(f"{stem}*.so"))
    if not found:
        if backend == "cuda":
            return "elf_fast was built without its CUDA library; reinstall with ELF_FAST_BUILD=cuda"
        return "elf_fast was built without its CPU library; reinstall with ELF_FAST_BUILD=cpu"
    if backend == "cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"{found[0].name} does not load: {error.__cause__ or error}"
    return None


def _interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on")


def _triton_problem() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not _interpreted() and torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    return None


def _why_not(backend: str) -> str | None:
    """Why a backend cannot run on this machine, or None."""
    reason = _unavailable[backend]
    needs_gpu = backend == "cuda" or (backend == "triton" and not _interpreted())
    if reason is None and needs_gpu and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return reason


@functools.cache
def _triton(name: str) -> Callable[..., Any]:
    """The Triton kernel of an operator. Triton is imported at the first call of this function."""
    module = importlib.import_module(f".kernels.{TRITON[name]}", __package__)
    return getattr(module, name)


def _triton_kernel(name: str) -> Callable[..., Any]:
    def kernel(*args):
        device = args[0].device
        if device.type != "cuda":
            return _triton(name)(*args)
        with torch.cuda.device(device):
            return _triton(name)(*args)

    return kernel


def _served_by(name: str, key: str) -> str:
    """The backend that serves an operator on a device if the user chose none."""
    if key == "CPU":
        return "cpu" if _unavailable["cpu"] is None else "torch"
    order = ["triton"] if name in TRITON else []
    if name in CUDA_CPP:
        order.insert(CUDA_DEFAULT[name][0] == "triton", "cuda")
    return next((b for b in order if _unavailable[b] is None), "torch")


def _serves(backend: str, name: str, key: str) -> bool:
    """Whether a chosen backend has a kernel of an operator for tensors of a device."""
    if backend == "triton":
        return name in TRITON and (key == "CUDA" or _interpreted())
    if backend == "cuda":
        return key == "CUDA" and name in CUDA_CPP
    return key.lower() == backend


def _refusing(name: str, backend: str, key: str):
    def kernel(*args, **kwargs):
        raise RuntimeError(
            f"elf_fast.{name}: backend {backend!r} was chosen and cannot serve {key} tensors"
        )

    return kernel


def _is_running(frame: FrameType | None) -> bool:
    """Whether a thread with this innermost frame is in a call of an operator of elf_fast."""
    while frame is not None:
        if frame.f_code in _CALLS and str(frame.f_locals.get("self")).startswith("elf_fast."):
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def _no_calls() -> Iterator[None]:
    """Waits until no other thread is calling an operator of elf_fast. Inside the block, other
    threads get to run Python only after `_HOLD` seconds. A kernel must not be replaced while it is
    called.

    Raises:
        RuntimeError: other threads have been calling for `_PATIENCE` seconds.
    """
    own, start, interval = threading.get_ident(), time.monotonic(), sys.getswitchinterval()
    try:
        while True:
            sys.setswitchinterval(_HOLD)
            if len(sys._current_frames()) > 1:
                # Threads that wait to run Python already do so for the old interval only.
                time.sleep(2 * interval)
            frames = sys._current_frames()
            if not any(_is_running(frame) for ident, frame in frames.items() if ident != own):
                break
            del frames
            sys.setswitchinterval(interval)
            if time.monotonic() - start > _PATIENCE:
                raise RuntimeError(
                    "use_backend: expected no other thread to be calling elf_fast, but some called "
                    f"for {_PATIENCE} s without a pause; the backend stays as it is"
                )
            time.sleep(1e-4)
        yield
    finally:
        sys.setswitchinterval(interval)


def _install(backend: str | None) -> None:
    """Registers the kernels of a chosen backend (None: the defaults) in place of the native ones,
    which register themselves when they load."""
    if backend is not None:
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
        reason = _why_not(backend)
        if reason is not None:
            raise RuntimeError(f"backend {backend!r} cannot run: {reason}")
    with _replacing, _no_calls():
        _replace(backend)


def _replace(backend: str | None) -> None:
    global _chosen, _override
    if _override is not None:
        _override._destroy()
    _chosen = backend
    _override = torch.library.Library("elf_fast", "IMPL")
    if backend == "torch":
        for key in _DEVICE_KEYS:
            ops.register_reference(_override, key, allow_override=True)
        return
    for key, name in itertools.product(_DEVICE_KEYS, ops.SCHEMAS):
        if backend is not None and not _serves(backend, name, key):
            _override.impl(name, _refusing(name, backend, key), key, allow_override=True)
        elif (backend or _served_by(name, key)) == "triton":
            _override.impl(name, _triton_kernel(name), key, allow_override=True)


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Serve every operator from one backend inside the block, for tests and benchmarks.

    backend: "torch" (the reference), "cpu", "cuda" (CUDA C++: exit_gate and compaction only) or
    "triton" (also on CPU tensors where TRITON_INTERPRET=1). The choice holds for the whole process,
    not for one thread. To begin and to end, the block waits until no other thread is in a call of
    elf_fast; a thread that the block started can be waited for with `join`.

    Raises:
        ValueError: no backend has this name. RuntimeError: it cannot run here (the message says
        why), the block calls an operator that it does not serve on the tensors' device, or other
        threads keep calling elf_fast for 10 s. If that happens when the block ends, the backend
        that was chosen for the block stays in use.
    """
    before = _chosen
    _install(backend)
    try:
        yield
    finally:
        _install(before)


_WHAT = {"torch": "plain PyTorch", "cpu": "C++", "cuda": "CUDA C++", "triton": "Triton"}


def report() -> dict[str, str]:
    """Which backend serves CPU and CUDA tensors, and why; keys "chosen", "cpu" and "cuda"."""
    lines = {"chosen": _chosen or "none: the defaults"}
    for key in _DEVICE_KEYS:
        served: dict[str, list[str]] = {}
        for name in ops.SCHEMAS:
            by = _chosen or _served_by(name, key)
            if by != "torch" and not _serves(by, name, key):
                by = "nothing"
            served.setdefault(by, []).append(name)
        everything = len(served) == 1
        parts = [
            (f"{by} ({_WHAT[by]})" if by in _WHAT else by)
            + ("" if everything else f" for {', '.join(names)}")
            for by, names in served.items()
        ]
        lines[key.lower()] = "; ".join(parts) + _reason(key, set(served))
    return lines


def _reason(key: str, served: set[str]) -> str:
    """Why these backends serve the tensors of a device, for `report`; "" if nothing is missing."""
    if _chosen is not None:
        return f": backend {_chosen!r} was chosen"
    wanted = ("cpu",) if key == "CPU" else ("cuda", "triton")
    missing = [f"{b}: {_unavailable[b]}" for b in wanted if _unavailable[b] is not None]
    return f" ({'; '.join(missing)})" if missing else ""


_use_kernels_beside_package()
for _backend in _LIBRARIES:
    _unavailable[_backend] = _load(_backend)
_unavailable["triton"] = _triton_problem()
_install(os.environ.get("ELF_FAST_BACKEND") or None)
