"""Networks with several classifiers, and classifiers that run in another order than defined."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from elf_fast import ELF, ExitHead, from_backbone, losses
from elf_fast.classifiers import (
    CosineClassifier,
    LogitAdjustment,
    adjust_logits_,
    classifiers,
    fold_scales_,
    learn_scales_,
    reset_classifiers_,
    tau_normalise_,
    train_classifiers,
    use_cosine_,
)
from elf_fast.heads import pool

C = 3
COUNTS = [90, 30, 6]
SHIFT = -losses.log_prior(COUNTS).float()
X = torch.randn(4, 5)


class Net(nn.Module):
    """A body and two classifiers, joined by the `forward` of a test. A layer that is no classifier
    is defined last."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, C), nn.Linear(6, C)
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 6)
        self.norm, self.scale = nn.LayerNorm(C), nn.Parameter(torch.tensor(3.0))

    def body(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def network(forward) -> Net:
    torch.manual_seed(0)
    return type("Custom", (Net,), {"forward": forward})().eval()


def mean(self, x):
    x = self.body(x)
    return (self.one(x) + self.two(x)) / 2


def by_stack(self, x):
    """A mean after dropout, in another order."""
    x = nn.functional.dropout(self.body(x), 0.5, self.training)
    return torch.stack([self.two(x), self.one(x)]).mean(0).reshape(-1, C)


def one(self, x):
    return self.one(self.body(x))


def levit():
    """The two classifiers of timm's LeViT, each behind a BatchNorm."""
    from timm.models.levit import NormLinear

    net = network(mean)
    net.one, net.two = NormLinear(6, C).eval(), NormLinear(6, C).eval()
    return net, X


def repvit():
    """The last module of timm's RepViT, which holds both classifiers."""
    from timm.models.repvit import RepVitClassifier

    net = network(lambda self, x: self.one(self.body(x)))
    net.one = RepVitClassifier(6, C, distillation=True).eval()
    return net, X


def deit():
    import timm

    net = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=C, img_size=32,
                            embed_dim=24, num_heads=2, depth=2)  # fmt: skip
    return net.eval(), torch.randn(1, 3, 32, 32)


#: (network and input, an exit, names of the classifiers)
NETWORKS = {
    "a mean": (lambda: (network(mean), X), "a", ["one", "two"]),
    "a mean of a stack": (lambda: (network(by_stack), X), "a", ["two", "one"]),
    "one, not defined last": (lambda: (network(one), X), "a", ["one"]),
    "DeiT": (deit, "blocks.0", ["head", "head_dist"]),
    "LeViT": (levit, "a", ["one.linear", "two.linear"]),
    "RepViT": (repvit, "a", ["one.head.l", "one.head_dist.l"]),
}


@pytest.fixture(params=NETWORKS)
def found(request):
    """(network without exits, the same with one, input, names of its classifiers)"""
    make, exit, names = NETWORKS[request.param]
    if make in (deit, levit, repvit):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    net, x = make()
    model = from_backbone(net, [exit], C, example_input=x, thresholds=float("inf")).eval()
    return net, model, x, names


def test_all_classifiers_of_the_logits_are_found_and_adjusted(found):
    net, model, x, names = found
    assert list(classifiers(net)) == names
    assert list(classifiers(model)) == ["heads.0.classifier", *(f"stages.1.{n}" for n in names)]
    with torch.no_grad():
        before, at_exit = net(x), model.heads[0](model.stages[0](x))
        adjust_logits_(model, COUNTS)
        for after in (net(x), model(x).logits):
            torch.testing.assert_close(after - before, SHIFT.expand(len(x), C), rtol=0, atol=1e-4)
        at_exit = model.heads[0](model.stages[0](x)) - at_exit
        torch.testing.assert_close(at_exit, SHIFT.expand(len(x), C), rtol=0, atol=1e-4)
        adjust_logits_(net, COUNTS, tau=2.0)
        torch.testing.assert_close(net(x) - before, 3 * SHIFT.expand(len(x), C), rtol=0, atol=1e-4)


@pytest.mark.parametrize("forward", [mean, by_stack])
def test_every_method_changes_all_classifiers(forward):
    def cut():
        return from_backbone(network(forward), ["a"], C, example_input=X)

    def changed(method) -> set[str]:
        model = cut()
        before = {name: c.weight.clone() for name, c in classifiers(model).items()}
        method(model)
        after = classifiers(model)
        return {n for n, w in before.items() if not torch.equal(after[n].weight, w)}

    everyone = {"heads.0.classifier", "stages.1.one", "stages.1.two"}
    assert changed(reset_classifiers_) == changed(lambda m: tau_normalise_(m, 1.0)) == everyone
    model = cut()
    learn_scales_(model)
    train_classifiers(model)
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(learning) == 3 and all(name.endswith(".scale") for name in learning)
    fold_scales_(model)
    use_cosine_(model)
    assert all(type(c) is CosineClassifier for c in classifiers(model).values())
    assert set(classifiers(model)) == everyone
    assert bool((model.eval()(X).logits.abs() <= 1 + 1e-6).all())


REFUSED = {
    "a sum": lambda self, x: self.one(self.body(x)) + self.two(self.body(x)),
    "weights": lambda self, x: 0.3 * self.one(self.body(x)) + 0.7 * self.two(self.body(x)),
    "the larger": lambda self, x: torch.maximum(self.one(self.body(x)), self.two(self.body(x))),
    "side by side": lambda self, x: torch.cat([self.one(self.body(x)), self.two(self.body(x))], 1),
    "a residual": lambda self, x: self.one(self.body(x)) + x[:, :C],
}


@pytest.mark.parametrize("name", REFUSED)
def test_logits_that_are_no_mean_are_refused(name):
    for method in (classifiers, lambda net: adjust_logits_(net, COUNTS), use_cosine_):
        net = network(REFUSED[name])
        state = {key: value.clone() for key, value in net.state_dict().items()}
        with pytest.raises(ValueError, match="^model: expected (logits that come|one classifier)"):
            method(net)
        torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.one(self.body(x)) * self.scale,
        lambda self, x: self.norm(self.one(self.body(x))),
        lambda self, x: (self.one(self.body(x)) + self.two(self.body(x))).softmax(1) / 2,
    ],
    ids=["scale", "norm", "softmax"],
)
def test_biases_are_not_changed_where_something_follows(forward):
    with pytest.raises(ValueError, match="^model: expected .*"):
        adjust_logits_(network(forward), COUNTS)


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, inputs, output: output * 10)


def other_forward(module: nn.Module) -> None:
    before = module.forward
    module.forward = lambda x: before(x) * 10


def in_a_subclass(module: nn.Module) -> None:
    forward = type(module).forward
    module.__class__ = type("Scaled", (type(module),), {"forward": lambda m, x: forward(m, x) * 10})


def without_bias(module: nn.Module) -> None:
    linear = getattr(module, "classifier", module)
    linear.__class__ = type(
        "Unbiased", (nn.Linear,), {"forward": lambda m, x: nn.functional.linear(x, m.weight)}
    )


@pytest.mark.parametrize("change", [hook, other_forward, in_a_subclass, without_bias])
@pytest.mark.parametrize("of", ["0", "0.classifier"])
def test_biases_are_not_changed_where_their_module_does_something_else(change, of):
    head = nn.Sequential(ExitHead(5, C))
    change(head.get_submodule(of))
    model = ELF([nn.Identity()], [head])
    before = head[0].classifier.bias.clone()
    with pytest.raises(ValueError, match="^heads.0.*: expected "):
        adjust_logits_(model, COUNTS)
    assert torch.equal(head[0].classifier.bias, before)
    assert list(classifiers(model)) == ["heads.0.0.classifier"]


def test_a_subclass_of_identity_may_change_the_logits():
    model = ELF([nn.Linear(5, C)], [nn.Identity()])
    in_a_subclass(model.heads[0])
    with pytest.raises(ValueError, match="^heads.0: expected an nn.Linear or .*, got Scaled"):
        adjust_logits_(model, COUNTS)


class Dropping(ExitHead):
    def forward(self, features: Tensor) -> Tensor:
        return self.classifier(nn.functional.dropout(pool(features), 0.5, self.training))


class Two(ExitHead):
    def __init__(self) -> None:
        super().__init__(5, 7)
        self.second = nn.Linear(7, C)

    def forward(self, features: Tensor) -> Tensor:
        return self.second(super().forward(features).relu())


class Deciding(ExitHead):
    def __init__(self) -> None:
        super().__init__(5, C)
        self.proj = nn.Linear(5, 5)

    def forward(self, features: Tensor) -> Tensor:
        if features.dim() == 4:
            features = features.mean((2, 3))
        return super().forward(self.proj(features))


class Cast(nn.Linear):
    """As timm's Linear."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Normed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x / x.norm(dim=1, keepdim=True), self.weight, self.bias)


def with_classifier(kind: type[nn.Linear]) -> ExitHead:
    head = ExitHead(5, C)
    head.classifier = kind(5, C, bias=False)
    return head


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda: Dropping(5, C), "classifier"),
        (Two, "second"),
        (Deciding, "classifier"),
        (lambda: with_classifier(Cast), "classifier"),
        (lambda: with_classifier(Normed), "classifier"),
    ],
)
def test_subclasses_that_hand_the_biases_on_are_adjusted(make, name):
    model = ELF([nn.Identity()], [make()]).eval()
    before = model(X).logits
    assert list(classifiers(model)) == [f"heads.0.{name}"]
    adjust_logits_(model, COUNTS)
    torch.testing.assert_close(model(X).logits - before, SHIFT.expand(4, C))


def test_one_classifier_with_a_scale_is_still_trained():
    net = network(lambda self, x: self.one(self.body(x)) * self.scale)
    train_classifiers(net)
    assert [n for n, p in net.named_parameters() if p.requires_grad] == ["one.weight", "one.bias"]


def test_a_forward_that_cannot_be_recorded():
    """The layer defined last is taken, if no other has as many outputs."""

    def forward(self, x):
        x = self.body(x)
        return self.one(x) if x.sum() > 0 else self.one(x) * 2

    net = network(forward)
    with pytest.raises(ValueError, match=r"^model: expected one classifier, .*\['a', 'b'\]"):
        classifiers(net)
    del net.b, net.a, net.two
    assert list(classifiers(net)) == ["one"]


def test_looking_changes_nothing():
    def forward(self, x):
        self.kept = x * torch.ones(5)
        return by_stack(self, self.kept)

    net = network(forward).train()
    net.a.eval()
    net.kept = None
    modes, attributes = [m.training for m in net.modules()], dict(vars(net))
    classifiers(net)
    assert [m.training for m in net.modules()] == modes and dict(vars(net)) == attributes


def test_adjustments_behind_a_head_stay():
    head = nn.Sequential(ExitHead(5, C), nn.Dropout(), LogitAdjustment(COUNTS, tau=0.5))
    model = ELF([nn.Identity()], [head]).eval()
    before = model(X).logits
    assert list(classifiers(model)) == ["heads.0.0.classifier"]
    adjust_logits_(model, COUNTS)
    torch.testing.assert_close(model(X).logits - before, SHIFT.expand(4, C))


def test_low_precision_is_close_enough():
    net = nn.Sequential(nn.Linear(4, 3), LogitAdjustment([100, 10, 1])).bfloat16()
    before = net[0].bias.clone()
    adjust_logits_(net, [1000, 100, 1])
    assert not torch.equal(net[0].bias, before)
