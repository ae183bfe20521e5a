"""Derivatives of every kind are those of the reference: forward mode, torch.func, batches of
gradients, and arguments made in inference mode."""

from __future__ import annotations

import pytest
import torch
from torch import func, nn
from torch.autograd import forward_ad

from elf_fast import ELF, ExitHead, functional, reference

# torch computes an operator without a rule for vmap sample by sample, and warns.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

Z = torch.randn(6, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
TANGENT = torch.randn(6, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
WEIGHT = torch.randn(3, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
TARGET, SURVIVORS = torch.tensor([4, 1, 0, 2, 3, 3]), torch.tensor([1, 2, 5])
VECTOR = torch.linspace(0.3, 1.2, 5, dtype=torch.float64)

CALLS = {
    "exit_gate": lambda F, z: F.exit_gate(z, 0.4, temperature=1.7, criterion="entropy").confidence,
    "exit_head": lambda F, z: F.exit_head(z[:, :, None, None], WEIGHT, None, 0.4).logits,
    "compact": lambda F, z: F.compact(z, SURVIVORS),
    "exit_loss": lambda F, z: F.exit_loss(z, TARGET).loss,
    "exit_loss with settings": lambda F, z: F.exit_loss(
        z, TARGET, weight=VECTOR, gamma=1.5, scale=2.0, margins=VECTOR, bias=VECTOR,
        label_smoothing=0.2, threshold=0.3,
    ).loss,
}  # fmt: skip


def _dual(f, z):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(z, TANGENT))).tangent


DERIVATIVES = {
    "jvp": lambda f: func.jvp(f, (Z,), (TANGENT,))[1],
    "dual numbers": lambda f: _dual(f, Z),
    "dual numbers with a gradient": lambda f: _dual(f, Z.clone().requires_grad_()),
    "grad": lambda f: func.grad(lambda z: f(z).square().sum())(Z),
    "jacfwd": lambda f: func.jacfwd(f)(Z),
    "jacrev": lambda f: func.jacrev(f)(Z),
    "hessian": lambda f: func.hessian(lambda z: f(z).square().sum())(Z),
    "a batch of gradients": lambda f: torch.autograd.functional.jacobian(f, Z, vectorize=True),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_derivatives_are_those_of_the_reference(call, derivative):
    found, expected = (
        DERIVATIVES[derivative](lambda z, F=F: CALLS[call](F, z)) for F in (functional, reference)
    )
    assert expected.any()
    torch.testing.assert_close(found, expected)


def test_gradients_of_single_samples():
    """Where the reference cannot run under vmap, which has no rule for its gate."""

    def one(z, y):
        return functional.exit_loss(z[None], y[None], gamma=2.0).loss.sum()

    found = func.vmap(func.grad(one))(Z, TARGET)
    z = Z.clone().requires_grad_()
    reference.exit_loss(z, TARGET, gamma=2.0).loss.sum().backward()
    torch.testing.assert_close(found, z.grad)
    # vmap inside of grad: the tensors that the operator gets do not say that they need a gradient.
    inside = func.grad(lambda z: func.vmap(one)(z, TARGET).sum())(Z)
    torch.testing.assert_close(inside, z.grad)
    for along in (
        func.jvp(lambda z: func.vmap(one)(z, TARGET), (Z,), (TANGENT,))[1],
        func.vmap(lambda z, y, t: func.jvp(lambda z: one(z, y), (z,), (t,))[1])(Z, TARGET, TANGENT),
    ):
        torch.testing.assert_close(along, (z.grad * TANGENT).sum(1))


def test_what_vmap_cannot_compute_raises():
    for call in ("exit_gate", "exit_head"):
        with pytest.raises(RuntimeError, match="vmap"):
            func.vmap(lambda z, call=call: CALLS[call](functional, z[None]))(Z)


def test_in_place_compaction_refuses_a_tangent():
    with forward_ad.dual_level():
        functional.compact_(Z.clone(), SURVIVORS)
        with pytest.raises(ValueError, match="features: expected no tangent for compact_"):
            functional.compact_(forward_ad.make_dual(Z.clone(), TANGENT), SURVIVORS)


def elf(cls, **options):
    torch.manual_seed(0)
    heads = [ExitHead(5, 4), nn.Sequential(nn.Linear(5, 4))]
    return cls([nn.Linear(5, 5), nn.Sequential(nn.Tanh(), nn.Linear(5, 5))], heads, **options)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("threshold", [0.35, float("inf")])
def test_derivatives_of_a_whole_network(training, threshold):
    y, found = TARGET % 4, []
    for cls in (reference.ELF, ELF):
        model = elf(cls, thresholds=threshold).double().train(training)
        parameters = dict(model.named_parameters())

        def loss(p, model=model):
            return func.functional_call(model, p, (Z, y)).loss

        def logits(x, model=model):
            return model(x).logits

        found.append((
            func.grad(loss)(parameters),
            func.jvp(logits, (Z,), (TANGENT,))[1],
            _dual(logits, Z),
        ))  # fmt: skip
        assert found[-1][1].any()
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("call", ["target", "weight", "temperature", "survivors"])
def test_arguments_made_in_inference_mode(call):
    def gradient(y, w, T, s):
        z = Z.float().requires_grad_()
        {
            "target": lambda: functional.exit_loss(z, y).loss,
            "weight": lambda: functional.exit_loss(z, y, weight=w, margins=w, bias=w).loss,
            "temperature": lambda: functional.exit_gate(z, 0.5, temperature=T).confidence,
            "survivors": lambda: functional.compact(z, s) ** 2,
        }[call]().sum().backward()
        return z.grad

    arguments = (TARGET, VECTOR.float(), torch.tensor(1.4), SURVIVORS)
    with torch.inference_mode():
        made_there = [argument.clone() for argument in arguments]
    expected = gradient(*arguments)
    assert torch.equal(gradient(*made_there), expected) and expected.any()


@pytest.mark.parametrize("exit_loss", [None, nn.CrossEntropyLoss(reduction="none")])
@pytest.mark.parametrize("cls", [reference.ELF, ELF], ids=["reference", "elf_fast"])
def test_a_network_trains_on_targets_made_in_inference_mode(cls, exit_loss):
    with torch.inference_mode():
        y = TARGET % 4
    model = elf(cls, exit_loss=exit_loss, thresholds=float("inf")).train()
    model(Z.float(), y).loss.backward()
    assert all(p.grad.any() for p in model.parameters())
