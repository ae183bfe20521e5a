"""The named losses against independent float64 formulas, and their arguments."""

from __future__ import annotations

import pytest
import torch

from elf_fast import losses

COUNTS = [500, 100, 20, 4]
N = torch.tensor(COUNTS, dtype=torch.float64)
Z = torch.randn(32, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
Y = torch.randint(0, 4, (32,), generator=torch.Generator().manual_seed(1))
ROWS = torch.arange(32)


def nll(z):
    return -(z - z.exp().sum(1, keepdim=True).log())[ROWS, Y]


def focal(z):
    return (1 - (-nll(z)).exp()) ** 2 * nll(z)


def class_balanced(z):
    w = (1 - 0.999) / (1 - 0.999**N)
    return (w / w.mean())[Y] * nll(z)


def ldam(z):
    margins = 0.5 * N**-0.25 / (4**-0.25)
    z = z.clone()
    z[ROWS, Y] -= margins[Y]
    return nll(10 * z)


def smoothed(z):
    q = z - z.exp().sum(1, keepdim=True).log()
    return 0.9 * nll(z) - 0.1 * q.mean(1)


MEMBERS = {
    "cross-entropy": (losses.CrossEntropyLoss, {}, nll),
    "smoothed": (losses.CrossEntropyLoss, {"label_smoothing": 0.1}, smoothed),
    "focal": (losses.FocalLoss, {"gamma": 2.0}, focal),
    "class-balanced": (
        losses.ClassBalancedLoss, {"class_counts": COUNTS, "beta": 0.999}, class_balanced
    ),
    "LDAM": (losses.LDAMLoss, {"class_counts": COUNTS, "scale": 10.0}, ldam),
    "balanced softmax": (
        losses.BalancedSoftmaxLoss, {"class_counts": COUNTS}, lambda z: nll(z + N.log())
    ),
    "logit adjustment": (
        losses.LogitAdjustedLoss, {"class_counts": COUNTS, "tau": 1.5},
        lambda z: nll(z + 1.5 * (N / N.sum()).log()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MEMBERS)
def test_formula_and_gradient(name):
    cls, kwargs, formula = MEMBERS[name]
    z, exact = Z.clone().requires_grad_(), Z.clone().requires_grad_()
    out = cls(**kwargs, reduction="none")(z, Y)
    # Class settings are float32 buffers; the arithmetic here is float64.
    torch.testing.assert_close(out, formula(exact), rtol=1e-5, atol=1e-6)
    out.sum().backward()
    formula(exact).sum().backward()
    torch.testing.assert_close(z.grad, exact.grad, rtol=1e-5, atol=1e-6)
    mean = cls(**kwargs)(Z, Y)
    assert mean.item() == pytest.approx(formula(Z).mean().item(), rel=1e-5)


def test_class_settings_move_with_the_loss():
    loss = losses.LDAMLoss(COUNTS)
    assert set(loss.state_dict()) == {"margins"}
    assert losses.ClassBalancedLoss(COUNTS).weight.mean().item() == pytest.approx(1.0)
