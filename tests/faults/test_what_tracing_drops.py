"""What a recorded forward cannot hold is refused, and the stages' gradients are the backbone's."""

from __future__ import annotations

import collections
import contextlib
import copy
import random
import threading
import time
import types

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import checkpoint

from elf_fast import agreement, from_backbone
from elf_fast.models import split

C = 3
X = torch.randn(4, 5)


class Net(nn.Module):
    """Layers that the `forward` of a test joins."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.fc = (nn.Linear(i, o) for i, o in
                                              ((5, 6), (6, 6), (6, 6), (6, C)))  # fmt: skip
        self.rng = np.random.default_rng(0)
        self.dice = random.Random(0)
        self.noise = torch.Generator().manual_seed(0)


def network(forward) -> nn.Module:
    torch.manual_seed(0)
    return type("Custom", (Net,), {"forward": forward})()


def around(context, part: str = "stem"):
    """A forward in which `context()` surrounds the call of a part."""

    def forward(self, x: Tensor) -> Tensor:
        for name in ("stem", "a", "b", "fc"):
            with context() if name == part else contextlib.nullcontext():
                x = getattr(self, name)(x)
        return x

    return forward


CONTEXTS = {
    "torch.no_grad()": torch.no_grad,
    "torch.inference_mode()": torch.inference_mode,
    "torch.enable_grad()": torch.enable_grad,
    'torch.autocast("cpu", enabled=False)': lambda: torch.autocast("cpu", enabled=False),
    'torch.autocast("cpu", enabled=True)': lambda: torch.autocast("cpu", torch.bfloat16),
    'torch.autocast("cuda", enabled=False)': lambda: torch.autocast("cuda", enabled=False),
}


def refuse(net: nn.Module, message: str) -> None:
    """Both functions refuse the network, whatever surrounds them, and leave it as it was."""
    modes = [module.training for module in net.modules()]
    attributes = set(vars(net))
    outside = (contextlib.nullcontext(), torch.no_grad(), torch.autocast("cpu"))
    for context in outside:
        with context:
            for cut in (split, lambda net, a: from_backbone(net, a, C, example_input=X)):
                with pytest.raises(ValueError) as caught:
                    cut(net, ["a"])
                assert message in str(caught.value) and str(caught.value).startswith("backbone: ")
    assert [module.training for module in net.modules()] == modes
    assert set(vars(net)) == attributes
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.parametrize("part", ["stem", "fc"])
def test_contexts_around_a_part(name, part):
    refuse(network(around(CONTEXTS[name], part)), f'got "{part}" under {name}')


def test_a_context_in_one_mode_only():
    def forward(self, x):
        with torch.set_grad_enabled(self.training):
            x = self.stem(x)
        return self.fc(self.b(self.a(x)))

    refuse(network(forward), '"stem" under torch.')


def test_a_decorated_forward():
    refuse(network(torch.no_grad()(around(contextlib.nullcontext))), '"stem" under torch.no_grad()')


def test_contexts_inside_a_module_stay():
    """A module that contains no exit is called, with all that its forward does."""
    net = nn.Sequential()
    frozen = network(around(torch.no_grad, "fc"))
    for name, module in (("frozen", frozen), ("a", nn.Linear(C, C)), ("fc", nn.Linear(C, C))):
        net.add_module(name, module)
    model = from_backbone(net, ["a"], C, example_input=X).train()
    model(X, torch.arange(4) % C).loss.backward()
    assert net.a.weight.grad.any() and net.fc.weight.grad.any()
    assert all(p.grad is None for p in frozen.parameters())


def test_frozen_parameters_stay_frozen():
    net = network(around(contextlib.nullcontext))
    net.stem.requires_grad_(False)
    model = from_backbone(net, ["a"], C, example_input=X).train()
    model(X, torch.arange(4) % C).loss.backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == ["stem.weight", "stem.bias"]
    from_backbone(net.requires_grad_(False), ["a"], C, example_input=X)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("part", ["stem", "a", "b"])
def test_gradient_checkpointing(reentrant, part):
    def forward(self, x):
        for name in ("stem", "a", "b", "fc"):
            layer = getattr(self, name)
            x = (
                checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
                if name == part
                else layer(x)
            )
        return x

    refuse(network(forward), f'"{part}" under gradient checkpointing')


def test_gradient_checkpointing_of_timm():
    net = pytest.importorskip("timm").create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_classes=C
    )
    x = torch.zeros(1, 3, 32, 32)
    from_backbone(net, ["blocks.0"], C, example_input=x)
    net.set_grad_checkpointing()
    with pytest.raises(ValueError, match="^backbone: .* under gradient checkpointing"):
        split(net, ["blocks.0"])


DRAWS = {
    "random": lambda self: random.random() < 2,
    "numpy": lambda self: np.random.rand() < 2,
    "torch": lambda self: bool(torch.rand(()) < 2),
    "a generator of numpy": lambda self: self.rng.random() < 2,
    "a generator of Python": lambda self: self.dice.random() < 2,
    "a generator of torch": lambda self: bool(torch.rand((), generator=self.noise) < 2),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("always", [True, False])
def test_random_decisions(name, always):
    """Also in training only, as in a layer that is dropped at random."""

    def forward(self, x):
        x = self.a(self.stem(x))
        if (always or self.training) and not DRAWS[name](self):
            return self.fc(x)
        return self.fc(self.b(x))

    refuse(network(forward), "got a random number that is drawn")


RNG = np.random.default_rng(0)
STEPS = iter(range(1000))
#: Factors that a forward finds in Python and that differ from one call or context to another.
FACTORS = {
    "a generator of nobody": lambda self: RNG.normal(),
    "a generator in an object": lambda self: self.config.rng.normal(),
    "a tensor from a generator": lambda self: torch.from_numpy(RNG.normal(size=6)).float(),
    "a clock": lambda self: time.perf_counter(),
    "a counter": lambda self: next(STEPS),
    "gradients": lambda self: 3.0 if torch.is_grad_enabled() else 1.0,
    "autocast": lambda self: 3.0 if torch.is_autocast_enabled("cpu") else 1.0,
}


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("always", [True, False])
def test_numbers_that_differ_each_time(name, always):
    def forward(self, x):
        x = self.stem(x)
        if always or self.training:
            return self.fc(self.b(self.a(x * FACTORS[name](self))))
        return self.fc(self.b(self.a(x * 1.0)))

    net = network(forward)
    net.config = types.SimpleNamespace(rng=np.random.default_rng(0))
    refuse(net, "backbone: expected a forward that does the same every time")


def test_operations_that_follow_autocast():
    def forward(self, x):
        x = self.stem(x)
        if torch.is_autocast_enabled("cpu"):
            x = x.float()
        return self.fc(self.b(self.a(x)))

    refuse(network(forward), 'got "a" once and .float() another time')


def test_constants_may_follow_autocast():
    def forward(self, x):
        offset = torch.ones(1, 8) @ (torch.arange(48.0) / 7).view(8, 6)
        return self.fc(self.b(self.a(self.stem(x) + offset)))

    from_backbone(network(forward), ["a"], C, example_input=X)


def test_tracing_draws_no_random_numbers():
    net = network(around(contextlib.nullcontext))
    states = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    split(net, ["a"])
    assert states == [random.getstate(), np.random.get_state()[1].tolist(),
                      torch.get_rng_state().tolist()]  # fmt: skip


HOOKS = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
         "register_full_backward_pre_hook")  # fmt: skip


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize("owner", ["", "body"])
def test_hooks_on_what_contains_an_exit(register, owner):
    """They would see the proxies of torch.fx, and never run again."""
    net = nn.Sequential()
    net.add_module("body", nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 6)))
    net.add_module("fc", nn.Linear(6, C))
    seen = []
    handle = getattr(net.get_submodule(owner), register)(lambda *args: seen.append(args))
    with pytest.raises(ValueError, match="^backbone: expected no hook on .*, got 1 in _"):
        from_backbone(net, ["body.0"], C, example_input=X)
    assert seen == []
    handle.remove()
    getattr(net.body[0], register)(lambda *args: seen.append(args))
    model = from_backbone(net, ["body.0"], C, example_input=X).train()
    seen.clear()
    model(X, torch.arange(4) % C).loss.backward()
    assert len(seen) == 1


def test_global_hooks_see_tensors_only():
    net = nn.Sequential()
    net.add_module("body", nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 6)))
    net.add_module("fc", nn.Linear(6, C))
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda *args: seen.append(args[2]))
    try:
        from_backbone(net, ["body.0"], C, example_input=X)
    finally:
        handle.remove()
    assert seen and all(isinstance(output, Tensor) for output in seen)


@pytest.mark.parametrize("owner", ["", "body"])
@pytest.mark.parametrize("method", ["train", "eval"])
@pytest.mark.parametrize("of_class", [True, False])
def test_train_and_eval_of_ones_own(of_class, method, owner):
    """They freeze normalisation, and the stages would thaw it."""
    net = nn.Sequential()
    net.add_module("body", nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)))
    net.add_module("fc", nn.Linear(6, C))
    module = net.get_submodule(owner)
    if of_class:
        module.__class__ = type("Frozen", (nn.Sequential,), {method: lambda self, *args: self})
    else:
        setattr(module, method, lambda *args: module)
    with pytest.raises(ValueError, match=rf"^backbone: expected the {method}\(\) of nn.Module on "):
        split(net, ["body.0"])


def test_a_train_that_is_refused_is_not_called():
    def train(self, loader):
        raise AssertionError

    net = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, C))
    net.train = types.MethodType(train, net)
    with pytest.raises(ValueError, match=r"^backbone: expected the train\(\) of nn.Module"):
        split(net, ["0"])


def test_a_train_of_its_own_inside_a_module_stays():
    frozen = type("Frozen", (nn.BatchNorm1d,), {"train": lambda self, mode=True: self})(6)
    frozen.training = False
    net = nn.Sequential(nn.Linear(5, 6), frozen, nn.Linear(6, C))
    from_backbone(net, ["0"], C, example_input=X).train()
    assert not frozen.training


@pytest.mark.parametrize("owner", ["", "body"])
def test_attributes_that_the_forward_sets(owner):
    """A counter would stand still, and what is kept for later would be a proxy of torch.fx."""

    class Counting(nn.Sequential):
        def forward(self, x):
            if "calls" in vars(self):
                self.calls += 1
            if "kept" in vars(self):
                self.kept = x
            if "keeps" in vars(self):
                self.new = x
            for filled in (self.__dict__.get("list"), self.__dict__.get("deque")):
                if filled is not None:
                    filled.append(x)
            if "dict" in vars(self):
                self.dict["calls"] += 1
            if "set" in vars(self):
                self.set.add(x)
            return super().forward(x)

    states = {"calls": 3, "kept": None, "keeps": True, "list": [1, 2],
              "dict": collections.Counter(calls=3),
              "set": {1, 2}, "deque": collections.deque([1, 2], maxlen=2)}  # fmt: skip
    for name, value in states.items():
        net = Counting()
        net.add_module("body", Counting(nn.Linear(5, 6), nn.Linear(6, 6)))
        net.add_module("fc", nn.Linear(6, C))
        setattr(net.get_submodule(owner), name, value)
        before = copy.copy(vars(net.get_submodule(owner))), copy.copy(value)
        with pytest.raises(ValueError, match="^backbone: .* attribute .* sets or fills, Counting."):
            split(net, ["body.0"])
        assert (vars(net.get_submodule(owner)), value) == before


def test_a_forward_of_the_instance():
    net = network(around(contextlib.nullcontext))
    net.forward = types.MethodType(around(torch.no_grad), net)
    refuse(net, "backbone: expected the forward of its class, got a Custom")


def test_weights_that_the_forward_computes_in_python():
    """Parameters that are read around torch.fx would become constants, with a gradient once."""

    def forward(self, x):
        mixed = torch.stack([p for p in self.b.parameters() if p.dim() == 2]).sum(0)
        return self.fc(self.a(self.stem(x)) @ mixed)

    net = network(forward)
    refuse(net, "got a tensor that Python computes from parameters")
    net.b.requires_grad_(False)
    from_backbone(net, ["a"], C, example_input=X)


class Scaled(torch.autograd.Function):
    """Hands on x, and its gradient times a factor."""

    @staticmethod
    def forward(ctx, x, factor, computes):
        ctx.factor = factor
        return x * 1 if computes else x

    @staticmethod
    def backward(ctx, grad):
        return ctx.factor * grad, None, None


@pytest.mark.parametrize(
    "computes, message",
    [
        (True, r"^backbone: .*, got mul\(\) under .* or in a torch.autograd.Function, which"),
        (
            False,
            "^backbone: .* its gradients on .* those of stem.weight, stem.bias, a.weight, a.bi",
        ),
    ],
)
def test_gradients_that_the_forward_changes(computes, message):
    """torch.fx records what a Function does in its forward only: the logits would be right."""

    def forward(self, x):
        return self.fc(Scaled.apply(self.b(self.a(self.stem(x))), -0.5, computes))

    with pytest.raises(ValueError, match=message):
        from_backbone(network(forward), ["a"], C, example_input=X)


def test_layers_without_gradient_in_evaluation():
    """A part that stops the gradient stops it in the stages."""

    def forward(self, x):
        return self.fc(self.b(self.a(self.stem(x).detach())))

    net = network(forward)
    model = from_backbone(net, ["a"], C, example_input=X)
    model.eval()(X).logits.sum().backward()
    assert net.stem.weight.grad is None and net.b.weight.grad.any()


def test_the_comparison_leaves_no_trace():
    net = network(around(contextlib.nullcontext)).train()
    with torch.inference_mode():
        from_backbone(net, ["a"], C, example_input=X.clone())
    from_backbone(net, ["a"], C, example_input=X)
    assert all(p.grad is None and p.requires_grad for p in net.parameters()) and net.training


class Counts(nn.Module):
    """Its forward writes into a buffer."""

    def __init__(self):
        super().__init__()
        self.a, self.fc = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps.add_(1)
        return self.fc(self.a(x))


def test_a_write_into_a_buffer_stays():
    net = Counts()
    model = from_backbone(net, ["a"], 3, example_input=torch.zeros(2, 4)).eval()
    before = net.steps.item()
    model(torch.zeros(2, 4))
    assert net.steps.item() == before + 1


class Moves(Net):
    """Its logits depend on a buffer that also moves in evaluation."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps.add_(1)
        return self.fc(self.b(self.a(self.stem(x)))) * self.steps


def test_logits_that_depend_on_a_buffer_that_moves():
    net = Moves()
    model = from_backbone(net, ["a"], C, example_input=X, thresholds=1.0)
    assert net.steps == 0
    twin = copy.deepcopy(net).eval()
    for _ in range(3):
        torch.testing.assert_close(model.eval()(X).logits, twin(X))


@pytest.mark.parametrize("always", [True, False])
@pytest.mark.parametrize(
    "is_tensor", [lambda x: isinstance(x, Tensor), lambda x: type(x) is Tensor]
)
def test_decisions_on_the_type_of_a_value(always, is_tensor):
    """torch.fx passes a proxy, which is no tensor."""

    def forward(self, x):
        x = self.stem(x)
        if (always or self.training) and is_tensor(x):
            x = x * 3
        return self.fc(self.b(self.a(x)))

    with pytest.raises(ValueError, match="^backbone: expected its stages to compute its logits"):
        from_backbone(network(forward), ["a"], C, example_input=X)


def test_rows_that_only_training_adds():
    def forward(self, x):
        if self.training and isinstance(x, Tensor):
            x = torch.cat([x, x])
        return self.fc(self.b(self.a(self.stem(x))))

    with pytest.raises(ValueError, match="^backbone: expected its stages to compute its logits"):
        from_backbone(network(forward), ["a"], C, example_input=X)


class Noisy(nn.Module):
    """In training it counts, and draws from the global generators and one of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.rng, self.calls, self.norm = np.random.default_rng(0), 0, nn.BatchNorm1d(6)
        self.lock = threading.Lock() if kind == "not copied" else None
        self.scale = (lambda: RNG.normal()) if kind == "different each time" else float

    def forward(self, x):
        if self.training:
            self.calls += 1
            x = x * self.rng.normal() + random.random() + np.random.rand() + torch.rand(6)
            x = self.norm(x) + self.scale()
        return F.dropout(x, 0.5, self.training)


@pytest.mark.parametrize("kind", ["copied", "not copied", "different each time"])
def test_training_is_compared_on_copies(kind):
    net = network(around(contextlib.nullcontext))
    net.stem = nn.Sequential(net.stem, Noisy(kind))
    before = copy.deepcopy(net.state_dict())
    states = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    agreement.features_and_logits(net, split(net, ["a"]), ["a"], X)
    assert states == [random.getstate(), np.random.get_state()[1].tolist(),
                      torch.get_rng_state().tolist()]  # fmt: skip
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert net.stem[1].calls == 0


def test_a_norm_without_running_statistics_can_be_cut():
    norm = nn.BatchNorm1d(8, track_running_stats=False)
    net = nn.Sequential(nn.Linear(5, 8), norm, nn.ReLU(), nn.Linear(8, 3))
    model = from_backbone(net, ["0"], 3, example_input=torch.randn(4, 5))
    assert model.heads[0].classifier.in_features == 8
