"""A user's numbers become the tensors that operators take."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from elf_fast import functional

TARGET = torch.tensor([0, 4, 2, 1, 1, 3, 0])


def logits():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(7, 5, generator=generator, dtype=torch.float32).requires_grad_()


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_numbers_mean_the_same_under_any_default_dtype(default):
    calls = [
        lambda: functional.exit_gate(logits(), 0.3, temperature=1.3),
        lambda: functional.exit_loss(logits(), TARGET, threshold=0.3),
    ]
    expected = [call() for call in calls]
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        torch.testing.assert_close([call() for call in calls], expected, rtol=0, atol=0)
    finally:
        torch.set_default_dtype(before)


def test_numbers_first_seen_under_a_mode_serve_everywhere():
    def gradient(temperature):
        z = logits()
        functional.exit_gate(z, 0.5, temperature=temperature).confidence.sum().backward()
        return z.grad

    with torch.inference_mode():
        functional.exit_gate(logits(), 0.5, temperature=1.234567)
    assert torch.equal(gradient(1.234567), gradient(torch.tensor(1.234567)))
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):  # how many survive
        gradient(1.234568)
    assert torch.equal(gradient(1.234568), gradient(torch.tensor(1.234568)))


@pytest.mark.parametrize("name", ["threshold", "temperature"])
def test_a_scalar_of_another_device_is_refused(name):
    z, y = torch.randn(3, 4), torch.zeros(3, dtype=torch.int64)
    elsewhere = {"threshold": torch.tensor(0.5), "temperature": torch.tensor(1.0)}
    elsewhere[name] = elsewhere[name].to("meta")
    t, T = elsewhere["threshold"], elsewhere["temperature"]
    for call in (
        lambda: functional.exit_gate(z, t, temperature=T),
        lambda: functional.exit_loss(z, y, threshold=t, temperature=T),
        lambda: functional.exit_head(z, torch.randn(4, 4), None, t, temperature=T),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected device cpu, got meta"):
            call()
