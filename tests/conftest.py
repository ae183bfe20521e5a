"""Devices and backends: one place that knows what can be tested here."""

from __future__ import annotations

import os

import pytest
import torch

# Without a GPU, Triton's interpreter runs its kernels on CPU tensors. Triton reads this when it is
# imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import emulated_cuda

import elf_fast
from elf_fast import backend as backends

torch.set_num_threads(2)

if not torch.cuda.is_available() and backends._why_not("triton") is None:
    from elf_fast.kernels import gate

    gate.TILE *= 16  # interpreted programs cost by their number: fewer and larger ones


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


@pytest.fixture(params=_serving(), ids=lambda pair: pair[0])
def device(request):
    """Every backend in turn; yields the device that it serves. "emulated cuda" leaves operators
    without a CUDA C++ kernel to the default."""
    name, device = request.param
    serving = emulated_cuda.serving() if name == "emulated cuda" else elf_fast.use_backend(name)
    with serving:
        yield device
