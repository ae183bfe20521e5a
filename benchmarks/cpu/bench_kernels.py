"""Every operator and its baselines, in one group per operator and shape.

    python -m pytest benchmarks/cpu/bench_kernels.py --benchmark-only

Every benchmark compares its result with the reference before it is timed.
"""

from __future__ import annotations

import pytest
import torch

from elf_fast import functional, ops, reference

from ..baselines import plain_gate, plain_head, plain_loss, read_only
from ..inputs import LOGITS

THRESHOLD = 0.9
FEATURES = {
    "ResNet-32 stage 1, 32x32": (64, 16, 32, 32),
    "ResNet-50 layer2, 224x224": (16, 512, 28, 28),
    "ResNet-50 layer4, 224x224": (64, 2048, 7, 7),
}


def logits(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize(
    "candidate", ["elf_fast", "elf_fast early stop", "reference", "plain", "read"]
)
@pytest.mark.parametrize("shape", LOGITS, ids=str)
def test_exit_gate(benchmark, shape, candidate):
    benchmark.group = f"exit_gate {list(shape)}"
    x = logits(shape)
    t, T = torch.tensor(THRESHOLD), torch.tensor(1.0)
    candidates = {
        "elf_fast": lambda: functional.exit_gate(x, THRESHOLD),
        "elf_fast early stop": lambda: ops.exit_gate(x, t, T, 0, None, True),
        "reference": lambda: reference.exit_gate(x, THRESHOLD),
        "plain": lambda: plain_gate(x, THRESHOLD),
        "read": lambda: read_only(x),
    }
    gate, expected = candidates["elf_fast"](), candidates["reference"]()
    assert torch.equal(gate.survivors, expected.survivors)
    with torch.inference_mode():
        benchmark(candidates[candidate])


@pytest.mark.parametrize("candidate", ["elf_fast", "elf_fast in place", "index_select"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", FEATURES)
def test_compact(benchmark, name, layout, candidate):
    benchmark.group = f"compact half of {name}, {layout}"
    x = torch.randn(FEATURES[name])
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    survivors = torch.arange(0, len(x), 2)
    candidates = {
        "elf_fast": lambda: functional.compact(x, survivors),
        "elf_fast in place": lambda: functional.compact_(x, survivors),
        "index_select": lambda: x.index_select(0, survivors),
    }
    assert torch.equal(candidates["elf_fast"](), candidates["index_select"]())
    with torch.inference_mode():
        benchmark(candidates[candidate])


@pytest.mark.parametrize("candidate", ["elf_fast", "reference", "cross-entropy alone"])
@pytest.mark.parametrize("shape", LOGITS, ids=str)
def test_exit_loss(benchmark, shape, candidate):
    """Forward and backward, with the gate; "cross-entropy alone" has no gate."""
    benchmark.group = f"exit_loss {list(shape)}"
    x = logits(shape).requires_grad_()
    y = torch.randint(0, shape[1], shape[:1])

    def step(loss):
        x.grad = None
        loss().sum().backward()

    candidates = {
        "elf_fast": lambda: functional.exit_loss(x, y, threshold=THRESHOLD).loss,
        "reference": lambda: reference.exit_loss(x, y, threshold=THRESHOLD).loss,
        "cross-entropy alone": lambda: plain_loss(x, y),
    }
    torch.testing.assert_close(candidates["elf_fast"](), candidates["reference"]())
    benchmark(step, candidates[candidate])


@pytest.mark.parametrize("candidate", ["elf_fast", "reference", "plain"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", FEATURES)
def test_exit_head(benchmark, name, layout, candidate):
    benchmark.group = f"exit_head {name}, {layout}"
    x = torch.randn(FEATURES[name])
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    linear = torch.nn.Linear(x.shape[1], 1000)
    w, b = linear.weight, linear.bias
    candidates = {
        "elf_fast": lambda: functional.exit_head(x, w, b, THRESHOLD),
        "reference": lambda: reference.exit_head(x, w, b, THRESHOLD),
        "plain": lambda: plain_head(x, linear, THRESHOLD),
    }
    with torch.inference_mode():
        torch.testing.assert_close(
            candidates["elf_fast"]().logits, candidates["reference"]().logits, rtol=1e-4, atol=1e-4
        )
        benchmark(candidates[candidate])
