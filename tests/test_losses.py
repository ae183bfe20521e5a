"""The named losses against independent float64 formulas, alone and at every exit of an ELF."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from elf_fast import ELF, functional, losses, reference

COUNTS = [500, 100, 20, 4]
N = torch.tensor(COUNTS, dtype=torch.float64)
Z = torch.randn(32, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
Y = torch.randint(0, 4, (32,), generator=torch.Generator().manual_seed(1))


def nll(z, y, eps=0.0):
    """Cross-entropy [n] against (1 - eps) e_y + eps / C."""
    log_q = z - z.exp().sum(1, keepdim=True).log()
    return -(1 - eps) * log_q[torch.arange(len(y)), y] - eps * log_q.mean(1)


def focal(z, y, eps=0.0):
    return (1 - (-nll(z, y)).exp()) ** 2 * nll(z, y, eps)


def effective(beta):
    w = (1 - beta) / (1 - beta**N)
    return w / w.mean()


def class_balanced(z, y, eps=0.0):
    return effective(0.999)[y] * nll(z, y, eps)


def ldam(z, y, eps=0.0):
    margins = 0.5 * N**-0.25 / (4**-0.25)
    z = z.clone()
    z[torch.arange(len(y)), y] -= margins[y]
    return nll(10 * z, y, eps)


def balanced_softmax(z, y, eps=0.0):
    return nll(z + N.log(), y, eps)


def logit_adjusted(z, y, eps=0.0):
    return nll(z + 1.5 * (N / N.sum()).log(), y, eps)


MEMBERS = {
    "cross-entropy": (losses.CrossEntropyLoss, {}, nll),
    "focal": (losses.FocalLoss, {"gamma": 2.0}, focal),
    "class-balanced": (
        losses.ClassBalancedLoss, {"class_counts": COUNTS, "beta": 0.999}, class_balanced
    ),
    "LDAM": (losses.LDAMLoss, {"class_counts": COUNTS, "scale": 10.0}, ldam),
    "balanced softmax": (losses.BalancedSoftmaxLoss, {"class_counts": COUNTS}, balanced_softmax),
    "logit adjustment": (
        losses.LogitAdjustedLoss, {"class_counts": COUNTS, "tau": 1.5}, logit_adjusted
    ),
}  # fmt: skip
EACH = pytest.mark.parametrize("name", MEMBERS)


def assert_same(ours, exact):
    # Class settings are float32 buffers; the arithmetic here is float64.
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)


def assert_follows(loss, formula):
    z, exact = Z.clone().requires_grad_(), Z.clone().requires_grad_()
    ours, theirs = loss(z, Y), formula(exact)
    assert_same(ours, theirs)
    ours.sum().backward()
    theirs.sum().backward()
    assert_same(z.grad, exact.grad)


@EACH
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_formula_and_gradient(name, eps):
    cls, kwargs, formula = MEMBERS[name]
    kwargs = {**kwargs, "label_smoothing": eps}
    assert_follows(cls(**kwargs, reduction="none"), lambda z: formula(z, Y, eps))
    mean = cls(**kwargs)(Z, Y)
    assert mean.item() == pytest.approx(formula(Z, Y, eps).mean().item(), rel=1e-5)


def test_class_settings_move_with_the_loss():
    loss = losses.LDAMLoss(COUNTS)
    assert set(loss.state_dict()) == {"margins"}
    assert losses.ClassBalancedLoss(COUNTS).weight.mean().item() == pytest.approx(1.0)


def test_weights_run_from_even_to_inverse_counts():
    assert losses.class_balanced_weight(COUNTS, 0.0).tolist() == [1.0] * 4
    inverse = (1 / N) / (1 / N).mean()
    torch.testing.assert_close(
        losses.class_balanced_weight(COUNTS, 1 - 1e-9), inverse, rtol=1e-5, atol=0
    )


# Margins in the exit test


@pytest.mark.parametrize("T", [0.9, 0.5])
def test_samples_leave_by_the_logits_that_the_loss_reads(T):
    loss = losses.DeferredReweighting(losses.LDAMLoss(COUNTS), COUNTS, start_epoch=1)
    z = torch.randn(8000, 4, generator=torch.Generator().manual_seed(0)) / 4
    y = z.argmax(1)
    seen = loss.scale * (z.double() - F.one_hot(y) * loss.margins)
    expected = seen.softmax(1).gather(1, y[:, None])[:, 0] >= T
    t = loss.margin_thresholds(T)
    leaves = torch.ones(len(z), dtype=torch.bool)
    gate = functional.exit_gate(z, t, temperature=1 / loss.scale, target=y)
    leaves[gate.survivors] = False
    # The largest margin, 15, gives thresholds of 1 - 3e-8 or 1 - 3e-7; float32 rounds by 6e-8.
    rest = 1 - (loss.scale * z.double()).softmax(1).amax(1)
    clear = (rest < 2e-8) | ((rest - 1 + t[y].double()).abs() > 1e-7)
    assert torch.equal(leaves[clear], expected[clear]) and clear.double().mean() > 0.95
    shares = [leaves[y == c].double().mean() for c in range(4)]
    assert 0.8 > shares[0] > shares[1] > shares[2] > shares[3] > 0


def test_margin_thresholds_of_several_exits_and_of_none():
    loss = losses.LDAMLoss(COUNTS)
    t = loss.margin_thresholds([0.9, 0.0, 1.0, math.inf])
    assert t.shape == (4, 4) and torch.equal(t[0], loss.margin_thresholds(0.9))
    assert [row.unique().tolist() for row in t[1:]] == [[0.0], [1.0], [math.inf]]
    with pytest.raises(ValueError, match=r"thresholds: expected values in \[0, 1\], or inf"):
        loss.margin_thresholds([0.9, 1.1])
    with pytest.raises(ValueError, match="margins: expected a loss with margins, got Cross"):
        losses.CrossEntropyLoss().margin_thresholds(0.9)


# Deferred re-weighting


@EACH
def test_weights_are_deferred_over_every_loss(name):
    cls, kwargs, formula = MEMBERS[name]
    loss = losses.DeferredReweighting(
        cls(**kwargs, label_smoothing=0.1, reduction="none"), COUNTS, start_epoch=2, beta=0.99
    )
    for epoch, weight in ((None, 1.0), (1, 1.0), (2, effective(0.99)[Y]), (7, effective(0.99)[Y]),
                          (0, 1.0)):  # fmt: skip
        if epoch is not None:
            loss.set_epoch(epoch)
        assert_follows(loss, lambda z, weight=weight: weight * formula(z, Y, 0.1))


def sevens(*arguments):
    return torch.full((32,), 7.0)


def with_hook(loss):
    loss.register_forward_hook(sevens)
    return loss


def with_forward(loss):
    loss.forward = sevens
    return loss


@pytest.mark.parametrize("change", [with_hook, with_forward])
@pytest.mark.parametrize("cls", [reference.ELF, ELF], ids=["reference", "elf_fast"])
def test_a_loss_with_a_hook_or_another_forward_is_called(cls, change):
    loss = change(losses.FocalLoss(reduction="none"))
    model = cls([nn.Identity()], [nn.Linear(4, 4)], exit_loss=loss).train()
    assert model(Z.float(), Y).loss.item() == 7


def deferred():
    return losses.DeferredReweighting(losses.LDAMLoss(COUNTS), COUNTS, start_epoch=2)


def test_a_loaded_loss_goes_on_with_its_weights():
    saved, resumed = deferred(), deferred()
    saved.set_epoch(3)
    state = saved.state_dict()
    assert set(state) == {"weight", "margins"}
    resumed.load_state_dict(state)
    assert resumed(Z, Y) == saved(Z, Y) != deferred()(Z, Y)
    resumed.set_epoch(3)
    assert resumed(Z, Y) == saved(Z, Y)
    resumed.set_epoch(1)
    assert resumed(Z, Y) == deferred()(Z, Y)


def test_the_loss_that_is_deferred_keeps_its_own_weights():
    own = losses.ClassBalancedLoss(COUNTS)
    before = own.weight.clone()
    losses.DeferredReweighting(own, COUNTS, start_epoch=0)
    assert torch.equal(own.weight, before)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: losses.DeferredReweighting(nn.CrossEntropyLoss(), COUNTS, start_epoch=0),
         TypeError, "loss: expected a loss of elf_fast.losses, got CrossEntropyLoss"),
        (lambda: losses.DeferredReweighting(losses.FocalLoss(), COUNTS, start_epoch=-1),
         ValueError, "start_epoch: expected an integer >= 0, got -1"),
        (lambda: losses.DeferredReweighting(with_hook(losses.FocalLoss()), COUNTS, start_epoch=0),
         ValueError, "loss: expected one without hooks and with the forward of LongTailLoss, got"),
        (lambda: losses.DeferredReweighting(losses.ClassBalancedLoss([1, 2]), COUNTS,
                                            start_epoch=1),
         ValueError, r"loss.weight: expected shape \[4\]"),
        (lambda: deferred().set_epoch(0.5), TypeError, "epoch: expected an integer, got 0.5"),
        (lambda: losses.class_balanced_weight(COUNTS, 1.0), ValueError,
         r"beta: expected a number in \[0, 1\), got 1.0"),
        (lambda: losses.log_prior([3, 0]), ValueError, "class_counts: .* at least 1, got"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# At every exit of an ELF

THRESHOLD, EXIT_WEIGHTS = 0.6, (1.0, 0.5, 2.0)
X = torch.randn(32, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def network(cls, loss, drop_exited):
    torch.manual_seed(6)
    stages = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in EXIT_WEIGHTS]
    heads = [nn.Linear(6, 4) for _ in EXIT_WEIGHTS]
    for head in heads:
        nn.init.normal_(head.weight, std=1.5)
    return cls(
        stages, heads, thresholds=THRESHOLD, exit_loss=loss, exit_weights=EXIT_WEIGHTS,
        drop_exited=drop_exited,
    ).double()  # fmt: skip


def specified(model, formula):
    """Loss and exits by design: every sample passes every exit, and counts up to the one it takes
    by being sure and right."""
    x, total = X, 0.0
    alive, exit_index = torch.ones(32, dtype=torch.bool), torch.full((32,), len(EXIT_WEIGHTS) - 1)
    for e, w in enumerate(EXIT_WEIGHTS):
        x = model.stages[e](x)
        z = model.heads[e](x)
        total = total + w * (alive * formula(z, Y)).sum()
        p = z.exp() / z.exp().sum(1, keepdim=True)
        leaves = alive & (p.max(1).values >= THRESHOLD) & (z.argmax(1) == Y)
        if e < len(EXIT_WEIGHTS) - 1:
            exit_index[leaves] = e
        alive = alive & ~leaves
    return total / 32, exit_index


@EACH
@pytest.mark.parametrize("cls", [reference.ELF, ELF], ids=["reference", "elf_fast"])
@pytest.mark.parametrize("drop_exited", [True, False], ids=["drop", "keep"])
def test_at_every_exit(name, cls, drop_exited):
    member, kwargs, formula = MEMBERS[name]
    loss = losses.DeferredReweighting(
        member(**kwargs, label_smoothing=0.1), COUNTS, start_epoch=1, beta=0.99
    )
    for epoch, weight in ((0, torch.ones(4)), (1, effective(0.99))):
        loss.set_epoch(epoch)
        model = network(cls, loss, drop_exited).train()
        exact, exit_index = specified(
            model, lambda z, y, weight=weight: weight[y] * formula(z, y, 0.1)
        )
        expected = torch.autograd.grad(exact, list(model.parameters()))
        out = model(X, Y)
        assert torch.equal(out.exit_index, exit_index) and len(exit_index.unique()) == 3
        assert_same(out.loss, exact)
        out.loss.backward()
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            assert_same(parameter.grad, gradient)


def test_a_loss_compiles_in_one_graph():
    torch.compiler.reset()
    loss = losses.BalancedSoftmaxLoss([9, 5, 1])
    logits, target = torch.randn(6, 3, requires_grad=True), torch.arange(6) % 3
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(logits, target)
    (grad,) = torch.autograd.grad(compiled, logits)
    expected = loss(logits, target)
    assert torch.equal(compiled, expected)
    assert torch.equal(grad, torch.autograd.grad(expected, logits)[0])
