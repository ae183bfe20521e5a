"""The fused path computes what the reference computes: stages and heads that write in place or
return views, replaced forwards, hooks, and gradients of every output."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules import module as modules

from elf_fast import ELF, ExitHead, fuse, reference, unfuse

BOTH = pytest.mark.parametrize("cls", [reference.ELF, ELF], ids=["reference", "elf_fast"])
D, C = 6, 5


class Function(nn.Module):
    """Calls f(module, x); a linear layer `layer` with its own weights is at hand."""

    def __init__(self, f, out=D):
        super().__init__()
        self.f, self.layer = f, nn.Linear(D, out)

    def forward(self, x):
        return self.f(self, x)


STAGES = {
    "linear": lambda: nn.Linear(D, D),
    "relu in place": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(D, D)),
    "sum in place": lambda: Function(lambda m, x: m.layer(x.add_(1.0))),
    "write through a view": lambda: Function(
        lambda m, x: m.layer(x[:, :3].mul_(2).new_zeros(()) + x)
    ),
    "write and return": lambda: nn.ELU(inplace=True),
    "nothing": lambda: nn.Identity(),
    "view": lambda: Function(lambda m, x: x.view(len(x), 2, 3).flatten(1)),
    "one of two views": lambda: Function(lambda m, x: torch.cat([m.layer(x), x], 1).chunk(2, 1)[0]),
    "norm in place": lambda: nn.Sequential(nn.Dropout(0.0, inplace=True), nn.BatchNorm1d(D)),
}
HEADS = {
    "exit head": lambda: ExitHead(D, C),
    "linear": lambda: nn.Linear(D, C),
    "view of the features": lambda: Function(lambda m, x: x[:, 1:]),
    "view of logits": lambda: Function(lambda m, x: m.layer(x)[:, :C]),
    "transposed": lambda: Function(lambda m, x: m.layer(x).t()[:C].t()),
    "one of two views": lambda: Function(lambda m, x: m.layer(x).split([C, 1], 1)[0]),
    "the same for all": lambda: Function(lambda m, x: m.layer.bias[:C].expand(len(x), C)),
    "in place": lambda: nn.Sequential(nn.Hardtanh(inplace=True), nn.Linear(D, C)),
}


def pair(stages, heads, **options):
    """The same network as the reference and fused, with its own copy of everything."""
    plain = reference.ELF([STAGES[s]() for s in stages], [HEADS[h]() for h in heads], **options)
    return plain, fuse(copy.deepcopy(plain))


def results(model, x, y, *, training, grad):
    """Outputs, the batch afterwards, and gradients of loss, logits and batch; or the error."""
    model.train(training)
    x = x.clone()
    if not grad:
        with torch.no_grad():
            return [*model(x, y), x]
    leaf = x.requires_grad_()
    out = model(leaf * 1.0, y)
    (out.loss + out.logits.square().sum()).backward()
    return [*out, leaf.grad, *(p.grad for p in model.parameters()), *model.buffers()]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    stages=st.lists(st.sampled_from([*STAGES]), min_size=3, max_size=3),
    heads=st.lists(st.sampled_from([*HEADS]), min_size=3, max_size=3),
    threshold=st.sampled_from([0.0, 0.35, math.inf]),
    drop_exited=st.booleans(),
    training=st.booleans(),
    grad=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_random_networks(stages, heads, threshold, drop_exited, training, grad, seed):
    torch.manual_seed(seed)
    options = {"thresholds": threshold, "drop_exited": drop_exited}
    plain, fused = pair(stages, heads, **options)
    x, y = torch.randn(7, D), torch.randint(0, C, (7,))
    try:
        expected = results(plain, x, y, training=training, grad=grad)
    except RuntimeError:  # torch's own: the head writes into what its stage saved for backward
        assert "in place" in heads and grad
        with pytest.raises(RuntimeError, match="in-?place"):
            results(fused, x, y, training=training, grad=grad)
        return
    found = results(fused, x, y, training=training, grad=grad)
    torch.testing.assert_close(found, expected)


@BOTH
@pytest.mark.parametrize("view", ["nothing", "view"])
@pytest.mark.parametrize("write", ["relu in place", "sum in place", "write through a view", None])
@pytest.mark.parametrize("how", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_the_callers_batch_stays_as_it_is(cls, view, write, how, training):
    """Also if the head writes, and in memory that is NumPy's."""
    stages = [STAGES[view](), STAGES[write or "linear"]()]
    heads = [HEADS["exit head" if write else "in place"](), HEADS["exit head"]()]
    model = cls(stages, heads, thresholds=math.inf).train(training)
    array = np.random.default_rng(0).standard_normal((4, D)).astype(np.float32)
    x = torch.from_numpy(array.copy())
    with how():
        model(x, torch.tensor([0, 1, 2, 3]))
    assert np.array_equal(x.numpy(), array)


@pytest.mark.parametrize("cls, exits", [(reference.ELF, 1), (ELF, 2)])
def test_under_torch_compile_writes_reach_neither_the_batch_nor_backward(cls, exits):
    torch.compiler.reset()
    stages = [STAGES["nothing"](), STAGES["relu in place"]()][:exits]
    heads = [HEADS["in place"](), HEADS["linear"]()][:exits]
    model = cls(stages, heads, thresholds=math.inf).train()
    x, y = torch.randn(4, D), torch.tensor([0, 1, 2, 3])
    given, expected = x.clone(), model(x, y)
    found = torch.compile(model, backend="eager")(given, y)
    torch.testing.assert_close(found, expected)
    assert torch.equal(given, x)
    found.loss.backward()


SHARED = {
    "expanded": lambda m, x: m.layer.bias.expand(len(x), D),
    "unfolded": lambda m, x: m.layer.weight.flatten()[: D + len(x) - 1].unfold(0, D, 1),
}


@pytest.mark.parametrize("rows", SHARED)
@pytest.mark.parametrize("how", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_rows_that_share_memory_are_written_apart(rows, how):
    stages = [Function(SHARED[rows]), STAGES["sum in place"]()]
    plain = reference.ELF(stages, [HEADS["exit head"]() for _ in stages], thresholds=math.inf)
    fused = fuse(copy.deepcopy(plain))
    x, y = torch.randn(7, D), torch.zeros(7, dtype=torch.int64)
    with how():
        torch.testing.assert_close(fused(x, y), plain(x, y))


def test_features_in_memory_that_is_not_of_torch():
    """Such memory has no lazy copies."""
    stages = [Function(lambda m, x: torch.from_numpy(x.numpy() + 1)), STAGES["relu in place"]()]
    model = ELF(stages, [HEADS["linear"](), HEADS["linear"]()], thresholds=math.inf).train()
    model(torch.randn(4, D), torch.zeros(4).long()).loss.backward()
    assert model.heads[0].weight.grad.any()


def test_what_a_stage_does_not_write_into_is_not_copied():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(x.data_ptr() if not torch.is_grad_enabled() else torch._C._is_cow_tensor(x))
            return x

    def model(**options):
        stages = [nn.Linear(D, D), nn.Sequential(Spy(), nn.Linear(D, D), Spy())]
        stages[0].register_forward_hook(lambda m, i, out: seen.append(out.data_ptr()))
        return ELF(stages, [ExitHead(D, C), ExitHead(D, C)], thresholds=math.inf, **options)

    def with_gaps():
        """Rows of a larger tensor, such as tokens without the first."""
        made = model()
        made.stages[0] = Function(lambda m, x: x.repeat(1, 2)[:, D:])
        made.stages[0].register_forward_hook(lambda m, i, out: seen.append(out.data_ptr()))
        return made

    with torch.inference_mode():
        model().eval()(torch.randn(4, D))
    assert seen[0] == seen[1]
    seen.clear()
    with torch.inference_mode():
        with_gaps().eval()(torch.randn(4, D))
    assert seen[0] == seen[1]
    seen.clear()
    model(drop_exited=False).train()(torch.randn(4, D), torch.zeros(4).long()).loss.backward()
    assert seen[1] is True  # still shared with the features that the head saved


def _forward_of_the_head(model):
    head = model.heads[0]
    head.forward = lambda x: 3 * type(head).forward(head, x)


def _forward_of_the_classifier(model):
    layer = model.heads[0].classifier
    layer.forward = lambda x: 3 * type(layer).forward(layer, x)


CHANGES = {"head": _forward_of_the_head, "classifier": _forward_of_the_classifier}


@pytest.mark.parametrize("change", CHANGES)
def test_a_forward_that_was_set_on_a_module_runs(change):
    torch.manual_seed(0)
    x, (plain, fused) = torch.randn(12, D), pair(["linear"] * 2, ["exit head"] * 2, thresholds=0.5)
    before = fused.eval()(x)
    for model in (plain, fused):
        CHANGES[change](model)
    expected, found = plain.eval()(x), fused(x)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found.confidence, before.confidence)


@pytest.mark.parametrize("owner", [nn.Linear, ExitHead])
def test_a_forward_that_was_set_on_a_class_runs(owner, monkeypatch):
    torch.manual_seed(0)
    x, (plain, fused) = torch.randn(12, D), pair(["nothing"] * 2, ["exit head"] * 2, thresholds=0.5)
    forward = owner.forward
    monkeypatch.setattr(owner, "forward", lambda self, x: 3 * forward(self, x))
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_global_hooks_see_every_layer(kind):
    x, (plain, fused) = torch.randn(5, D), pair(["linear"] * 2, ["exit head"] * 2, thresholds=0.0)
    register = getattr(modules, f"register_module_{kind}_hook")
    seen = []
    for model in (plain.eval(), fused.eval()):
        handle = register(lambda module, *_: seen.append(type(module).__name__))
        try:
            model(x).logits.sum().backward()
        finally:
            handle.remove()
    assert seen.count("ExitHead") == 2 and seen.count("Linear") == 4


@BOTH
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("threshold", [0.3, math.inf])
def test_every_exit_that_ran_takes_part_in_every_backward_pass(cls, training, threshold):
    """With a gradient of 0 where another exit gives the logits, also beside NaN."""
    torch.manual_seed(1)
    model = cls([STAGES["linear"]() for _ in range(3)], [nn.Linear(D, C) for _ in range(3)],
                thresholds=threshold).train(training)  # fmt: skip
    x = torch.randn(6, D)
    x[0] = math.nan
    out = model(x, torch.zeros(6, dtype=torch.int64))
    assert 2 in out.exit_index
    out.logits[1:].sum().backward()
    for head in model.heads:
        assert head.bias.grad is not None and not head.bias.grad.isnan().any()
    if threshold == math.inf:
        assert [bool(head.bias.grad.any()) for head in model.heads] == [False, False, True]


@BOTH
def test_only_an_early_head_that_trains_gets_a_gradient_of_zero(cls):
    model = cls([STAGES["linear"]() for _ in range(3)], [nn.Linear(D, C) for _ in range(3)],
                thresholds=math.inf).requires_grad_(False)  # fmt: skip
    model.heads[1].requires_grad_(True)
    model(torch.randn(6, D)).logits.sum().backward()
    assert not model.heads[1].weight.grad.any()


def test_fuse_keeps_one_module_that_occurs_twice():
    one = reference.ELF([nn.Linear(D, D)], [nn.Linear(D, C)])
    inner = nn.Sequential(one)
    model = nn.ModuleDict({"teacher": inner, "student": nn.ModuleList([inner, one])})
    fused = fuse(model)
    assert fused["teacher"] is fused["student"][0] and fused["teacher"][0] is fused["student"][1]
    assert type(fused["teacher"][0]) is ELF and model["teacher"] is inner
    assert len([*fused.modules()]) == len([*model.modules()])
    back = unfuse(fused)
    assert back["teacher"] is back["student"][0] and type(back["teacher"][0]) is reference.ELF
