"""The operators as the rest of PyTorch sees them: opcheck, gradcheck, torch.compile, autocast."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.library import opcheck

from elf_fast import criteria, functional, ops

ONE = torch.tensor(1.3)
HALF = torch.tensor(0.5)


def _logits(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(7, 5, generator=generator, dtype=dtype).requires_grad_()


TARGET = torch.tensor([0, 4, 2, 1, 1, 3, 0])
SURVIVORS = torch.tensor([0, 2, 5])
PADDED = torch.tensor([0, 2, 5, 7, 7, 7, 7])
PER_CLASS = torch.linspace(0.2, 1.0, 5)
IMAGES = torch.randn(7, 6, 3, 3, generator=torch.Generator().manual_seed(1))

CALLS = {
    "exit_gate": lambda: (ops.exit_gate, (_logits(), HALF, ONE, 0, None, False)),
    "exit_gate margin": lambda: (ops.exit_gate, (_logits(), PER_CLASS, ONE, 1, TARGET, False)),
    "exit_gate entropy": lambda: (
        ops.exit_gate, (_logits(), HALF, ONE, criteria.TABLE["entropy"].code, None, False)
    ),
    "exit_gate early": lambda: (ops.exit_gate, (_logits(), 0 * HALF, ONE, 0, None, True)),
    "exit_head": lambda: (
        ops.exit_head,
        (IMAGES.clone().requires_grad_(), torch.randn(5, 6).requires_grad_(),
         torch.randn(5).requires_grad_(), HALF, ONE, 0, None, False, True),
    ),
    "exit_head channels last": lambda: (
        ops.exit_head,
        (IMAGES.to(memory_format=torch.channels_last).requires_grad_(), torch.randn(5, 6), None,
         HALF, ONE, 0, TARGET, False, True),
    ),
    "exit_head tokens": lambda: (
        ops.exit_head,
        (torch.randn(7, 4, 6).requires_grad_(), torch.randn(5, 6), None, HALF, ONE, 0, None, False,
         True),
    ),
    "exit_head without logits": lambda: (
        ops.exit_head,
        (torch.randn(7, 6), torch.randn(5, 6), None, HALF, ONE, 0, None, False, False),
    ),
    "exit_head float64 without logits": lambda: (
        ops.exit_head,
        (torch.randn(7, 6).double(), torch.randn(5, 6).double(), None, HALF.double(), ONE.double(),
         0, None, False, False),
    ),
    "compact": lambda: (ops.compact, (IMAGES.clone().requires_grad_(), SURVIVORS)),
    "compact channels last": lambda: (
        ops.compact,
        (IMAGES.to(memory_format=torch.channels_last).requires_grad_(), SURVIVORS),
    ),
    "compact_into": lambda: (
        ops.compact_into, (torch.zeros_like(IMAGES), IMAGES, SURVIVORS, None)
    ),
    "compact_into counted": lambda: (
        ops.compact_into, (torch.zeros_like(IMAGES), IMAGES, PADDED, torch.tensor(3))
    ),
    "compact_": lambda: (ops.compact_, (IMAGES.clone(), SURVIVORS, None)),
    "compact_ counted": lambda: (ops.compact_, (IMAGES.clone(), PADDED, torch.tensor(3))),
    "compact_backward": lambda: (ops.compact_backward, (IMAGES[:3].clone(), SURVIVORS, 7)),
    "exit_loss": lambda: (
        ops.exit_loss,
        (_logits(), TARGET, PER_CLASS, PER_CLASS, PER_CLASS, 1.5, 2.0, 0.1, HALF, ONE, 0),
    ),
    "exit_loss cross-entropy": lambda: (
        ops.exit_loss,
        (_logits(), TARGET, None, None, None, 0.0, 1.0, 0.0, HALF, ONE, 0),
    ),
    "exit_loss_backward": lambda: (
        ops.exit_loss_backward,
        (torch.rand(7), _logits().detach(), TARGET, torch.rand(7), None, PER_CLASS, None, 0.0, 1.0,
         0.0),
    ),
}  # fmt: skip


#: Along random directions instead of every coordinate, because Triton's interpreter is slow.
gradcheck = functools.partial(torch.autograd.gradcheck, fast_mode=True)
gradgradcheck = functools.partial(torch.autograd.gradgradcheck, fast_mode=True)


def place(x, device):
    """Tensors moved to the device; leaves of autograd stay leaves."""
    if not isinstance(x, torch.Tensor):
        return x
    return x.detach().to(device).requires_grad_(x.requires_grad)


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name, device):
    op, args = CALLS[name]()
    opcheck(op, tuple(place(a, device) for a in args))


@pytest.mark.parametrize(
    "name", [n for n in CALLS if "_into" not in n and "compact_ " not in n + " "]
)
def test_compile_fullgraph(name):
    torch.compiler.reset()
    op, args = CALLS[name]()
    args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
    compiled = torch.compile(lambda *a: op(*a), fullgraph=True, dynamic=False, backend="aot_eager")
    expected, out = op(*args), compiled(*args)
    for a, b in zip(
        expected if isinstance(expected, tuple) else (expected,),
        out if isinstance(out, tuple) else (out,),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_inductor_fullgraph():
    """One graph through the default compiler: head, loss and their gradients."""
    x, w = IMAGES.clone().requires_grad_(), torch.randn(5, 6).requires_grad_()

    def step(x, w):
        z, *_ = ops.exit_head(x, w, None, HALF, ONE, 0, None, False, True)
        loss, *_ = ops.exit_loss(z, TARGET, None, None, None, 0.0, 1.0, 0.0, HALF, ONE, 0)
        return loss.mean()

    step(x, w).backward()
    expected = x.grad.clone(), w.grad.clone()
    x.grad = w.grad = None
    torch.compile(step, fullgraph=True, dynamic=False)(x, w).backward()
    torch.testing.assert_close((x.grad, w.grad), expected)


@pytest.mark.parametrize("criterion", [*criteria.TABLE])
def test_gradcheck_exit_gate(criterion, device):
    def confidence(z):
        return functional.exit_gate(z, 0.5, temperature=1.3, criterion=criterion).confidence

    assert gradcheck(confidence, (place(_logits(torch.float64), device),))
    z = torch.randn(3, 1, dtype=torch.float64, device=device, requires_grad=True)
    assert gradcheck(confidence, (z,))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("plain", [True, False])
def test_gradcheck_exit_loss(gamma, smoothing, plain, device):
    names = () if plain else ("weight", "margins", "bias")
    vectors = dict.fromkeys(names, PER_CLASS.to(device))
    target = TARGET.to(device)

    def loss(z):
        return functional.exit_loss(
            z,
            target,
            gamma=gamma,
            scale=1.0 if plain else 2.0,
            label_smoothing=smoothing,
            **vectors,
        ).loss

    assert gradcheck(loss, (place(_logits(torch.float64), device),))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradient_of_the_gradient_of_exit_loss(gamma):
    def loss(z):
        vectors = dict.fromkeys(("weight", "margins", "bias"), PER_CLASS)
        return functional.exit_loss(
            z, TARGET, gamma=gamma, scale=2.0, label_smoothing=0.1, **vectors
        ).loss

    assert gradgradcheck(loss, (_logits(torch.float64),))


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6), (4, 6, 2, 3)], ids=str)
def test_gradcheck_exit_head(shape, device):
    x, w, b = (
        torch.randn(size, dtype=torch.float64, device=device, requires_grad=True)
        for size in (shape, (5, 6), (5,))
    )
    assert gradcheck(lambda *a: functional.exit_head(*a, 0.5).logits, (x, w, b))


def test_gradcheck_compact(device):
    x = torch.randn(7, 3, 2, dtype=torch.float64, device=device, requires_grad=True)
    survivors = SURVIVORS.to(device)
    assert gradcheck(lambda x: functional.compact(x, survivors), (x,))
    # Of a square, because compaction alone is linear.
    assert gradgradcheck(lambda x: functional.compact(x, survivors) ** 2, (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_linear_then_float32_softmax(dtype, device):
    x, w, b, target = (
        t.to(device) for t in (IMAGES, torch.randn(5, 6), torch.randn(5), TARGET)
    )  # fmt: skip
    with torch.autocast(device, dtype=dtype):
        head = functional.exit_head(x, w, b, 0.5)
        linear = torch.nn.functional.linear(x.mean(dim=(2, 3)), w, b)
        gate = functional.exit_gate(head.logits, 0.5)
        loss = functional.exit_loss(head.logits, target).loss
    assert head.logits.dtype == linear.dtype == dtype
    torch.testing.assert_close(head.logits, linear, rtol=2e-2, atol=2e-2)
    assert gate.confidence.dtype == loss.dtype == head.confidence.dtype == torch.float32
    expected = torch.softmax(head.logits.float(), dim=1).amax(dim=1)
    torch.testing.assert_close(gate.confidence, expected)
    torch.testing.assert_close(head.confidence, expected)
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(head.logits.float(), target, reduction="none")
    )


def test_autocast_gradients_reach_float32_parameters(device):
    x = IMAGES.clone().to(device).requires_grad_()
    w = torch.randn(5, 6, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        head = functional.exit_head(x, w, None, 0.5)
        functional.exit_loss(head.logits, TARGET.to(device)).loss.sum().backward()
    assert x.grad.dtype == w.grad.dtype == torch.float32
    assert bool(w.grad.abs().sum() > 0)


def test_in_place_compaction_is_seen_by_autograd():
    """Backward raises if a tensor saved for it was changed."""
    x = torch.randn(4, 3)
    w = torch.randn(4, 3, requires_grad=True)
    product = (w * x).sum()
    functional.compact_(x, torch.tensor([1, 3]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
