"""Devices and backends: one place that knows what can be tested here."""

from __future__ import annotations

import pytest
import torch

import elf_fast
from elf_fast import backend as backends

torch.set_num_threads(2)


def _serving() -> list[tuple[str, str]]:
    """(backend, device) pairs that can run on this machine."""
    pairs = [("torch", "cpu")]
    if backends._why_not("cpu") is None:
        pairs.append(("cpu", "cpu"))
    return pairs


@pytest.fixture(params=_serving(), ids=lambda pair: pair[0])
def device(request):
    """Every backend in turn; yields the device that it serves."""
    name, device = request.param
    with elf_fast.use_backend(name):
        yield device
