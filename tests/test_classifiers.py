"""Classifiers after the first stage of training, and the normalised one, at every exit."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from elf_fast import ELF, ExitHead, from_backbone, losses, reference
from elf_fast.classifiers import (
    CosineClassifier,
    LogitAdjustment,
    adjust_logits_,
    classifiers,
    fold_scales_,
    learn_scales_,
    reset_classifiers_,
    tau_normalise_,
    tau_normalised,
    train_classifiers,
    use_cosine_,
)
from elf_fast.modules import is_fusable

COUNTS = [300, 60, 12, 3]
LOG_PRIOR = (torch.tensor(COUNTS).double() / 375).log()
BOTH = pytest.mark.parametrize("cls", [reference.ELF, ELF], ids=["reference", "elf_fast"])
X = torch.randn(24, 3, 6, 6, generator=torch.Generator().manual_seed(0))
X += 2 * torch.randn(24, 3, 1, 1, generator=torch.Generator().manual_seed(2))
Y = torch.randint(4, (24,), generator=torch.Generator().manual_seed(1))


def elf(cls=ELF, **options):
    torch.manual_seed(0)
    stages, heads = [], []
    for channels in (3, 8, 8):
        conv = nn.Conv2d(channels, 8, 3, padding=1)
        stages.append(nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU()))
        heads.append(ExitHead(8, 4))
        nn.init.normal_(heads[-1].classifier.weight, std=1.5)
    return cls(stages, heads, **{"thresholds": 0.6, **options})


def backbone():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )


def cut():
    return from_backbone(backbone(), ["1"], 4, example_input=X[:2])


def logits_at_every_exit(model):
    x, logits = X, []
    with torch.no_grad():
        for stage, head in zip(model.eval().stages, model.heads, strict=True):
            x = stage(x)
            logits.append(head(x))
    return torch.stack(logits)


@BOTH
def test_the_classifier_of_every_exit_is_found(cls):
    names = [f"heads.{e}.classifier" for e in range(3)]
    assert list(classifiers(elf(cls))) == names
    assert list(classifiers(nn.Sequential(elf(cls)))) == [f"0.{name}" for name in names]


def test_the_networks_own_classifier_is_found_in_the_last_stage():
    model = cut()
    found = classifiers(model)
    assert list(found) == ["heads.0.classifier", "stages.1.4"]
    assert found["stages.1.4"] is model.get_submodule("stages.1.4")
    plain = backbone()
    assert classifiers(plain) == {"4": plain[4]}
    assert list(classifiers(nn.Linear(2, 2))) == [""]
    deep = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    assert list(classifiers(deep)) == ["2"]


@pytest.mark.parametrize("compiled", [False, True])
def test_the_networks_own_classifier_is_the_one_that_runs_last(compiled):
    """Not a linear layer of the blocks before it, which lie deeper in the network's names."""
    torch.manual_seed(0)
    net = nn.Sequential(
        OrderedDict(
            blocks=nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))),
            norm=nn.LayerNorm(8),
            head=nn.Linear(8, 4),
        )
    )
    model = from_backbone(net, ["blocks.0"], 4, example_input=X[:2, 0, 0, :4].repeat(1, 2))
    name = "stages.1.head"
    if compiled:
        model.stages[1], name = torch.compile(model.stages[1]), "stages.1._orig_mod.head"
    assert list(classifiers(model)) == ["heads.0.classifier", name]
    assert classifiers(model)[name] is net.head


# cRT


@pytest.mark.parametrize("make", [elf, cut, backbone])
def test_retraining_moves_the_classifiers_and_nothing_else(make):
    model = make()
    model.train()
    first = {name: c.weight.clone() for name, c in classifiers(model).items()}
    reset_classifiers_(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_classifiers(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    if isinstance(model, ELF):
        assert model.training
        loss = model(X, Y).loss
    else:
        loss = nn.functional.cross_entropy(model(X), Y)
    loss.backward()
    optimizer.step()
    moved = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert moved == {f"{name}.{p}" for name in first for p in ("weight", "bias")}
    assert all(not torch.equal(before[f"{name}.weight"], w) for name, w in first.items())


# Tau-normalisation


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_tau_normalised_weights_follow_the_formula(tau):
    weight = torch.randn(4, 8, dtype=torch.float64)
    expected = torch.stack([w / math.sqrt(sum(v * v for v in w.tolist())) ** tau for w in weight])
    torch.testing.assert_close(tau_normalised(weight, tau), expected)
    weight[2] = 0
    assert not tau_normalised(weight, tau)[2].any()


@BOTH
def test_tau_normalisation_reaches_every_exit(cls):
    model = elf(cls)
    weights = [c.weight.detach().clone() for c in classifiers(model).values()]
    tau_normalise_(model, 0.7)
    x, logits = X, logits_at_every_exit(model)
    for e, (stage, weight) in enumerate(zip(model.stages, weights, strict=True)):
        x = stage(x)
        expected = x.mean((2, 3)) @ (weight / weight.pow(2).sum(1, keepdim=True) ** 0.35).T
        torch.testing.assert_close(logits[e], expected)


# LWS


@pytest.mark.parametrize("make", [elf, cut])
def test_learnt_scales_train_alone_and_fold_into_the_weights(make):
    model = make()
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    start = logits_at_every_exit(model)
    learn_scales_(model)
    torch.testing.assert_close(logits_at_every_exit(model), start)
    train_classifiers(model)
    learning = [p for p in model.parameters() if p.requires_grad]
    assert [p.shape for p in learning] == [(4,)] * len(model.heads)
    model(X, Y).loss.backward()
    torch.optim.SGD(learning, lr=0.5).step()
    scales = [c.parametrizations.weight[0].scale.detach() for c in classifiers(model).values()]
    assert all((s != 1).any() for s in scales)
    scaled = logits_at_every_exit(model)
    fold_scales_(model)
    torch.testing.assert_close(logits_at_every_exit(model), scaled)
    for scale, (name, classifier) in zip(scales, classifiers(model).items(), strict=True):
        assert type(classifier) is nn.Linear
        expected = torch.diag(scale) @ plain[f"{name}.weight"]
        torch.testing.assert_close(classifier.weight.detach(), expected)
    assert set(model.state_dict()) == set(plain)
    assert is_fusable(model.heads[0])


# Logit adjustment


def test_logits_are_adjusted_by_the_prior():
    z = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(
        LogitAdjustment(COUNTS, tau=1.5)(z), z - 1.5 * LOG_PRIOR, rtol=1e-6, atol=1e-6
    )
    assert LogitAdjustment(COUNTS)(z.bfloat16()).dtype == torch.bfloat16


@BOTH
def test_every_exit_is_adjusted_and_reads_it(cls):
    model = elf(cls)
    z = logits_at_every_exit(model).double() - 0.5 * LOG_PRIOR
    sure = z.softmax(2).amax(2) >= 0.6
    sure[-1] = True
    exit_index = sure.int().argmax(0)
    assert len(exit_index.unique()) > 1
    wrapped = elf(cls)
    for e, head in enumerate(wrapped.heads):
        wrapped.heads[e] = nn.Sequential(head, LogitAdjustment(COUNTS, tau=0.5))
    adjust_logits_(model, COUNTS, tau=0.5)
    assert all(is_fusable(head) for head in model.heads)
    for out in (model.eval()(X), wrapped.eval()(X)):
        assert torch.equal(out.exit_index, exit_index)
        torch.testing.assert_close(out.logits.double(), z[exit_index, torch.arange(24)],
                                   rtol=1e-4, atol=1e-5)  # fmt: skip


def test_a_classifier_without_bias_gets_one():
    linear = nn.Linear(8, 4, bias=False)
    adjust_logits_(linear, COUNTS)
    torch.testing.assert_close(linear.bias.detach(), -LOG_PRIOR.float())


# Classifiers that exits share


def shared(what):
    heads = [ExitHead(8, 4), ExitHead(8, 4)]
    if what == "head":
        heads[1] = heads[0]
    elif what == "classifier":
        heads[1].classifier = heads[0].classifier
    else:
        heads[1].classifier.weight = heads[0].classifier.weight
        heads[1].classifier.bias = heads[0].classifier.bias
    return ELF([nn.Identity(), nn.Identity()], heads), heads[0].classifier


@pytest.mark.parametrize("what", ["head", "classifier", "parameters"])
def test_what_exits_share_is_changed_once(what):
    model, linear = shared(what)
    assert list(classifiers(model)) == ["heads.0.classifier", "heads.1.classifier"]
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    adjust_logits_(model, COUNTS)
    torch.testing.assert_close(linear.bias.detach(), bias - LOG_PRIOR.float())
    tau_normalise_(model, 0.5)
    torch.testing.assert_close(linear.weight.detach(), tau_normalised(weight, 0.5))
    if what == "parameters":
        with pytest.raises(ValueError, match="^heads.1.classifier: expected weights of its own"):
            learn_scales_(model)
    else:
        learn_scales_(model)
        linear.parametrizations.weight[0].scale.data.fill_(2.0)
        fold_scales_(model)
        torch.testing.assert_close(linear.weight.detach(), 2 * tau_normalised(weight, 0.5))
    use_cosine_(model)
    assert model.heads[0].classifier is model.heads[1].classifier
    assert isinstance(model.heads[0].classifier, CosineClassifier)


def test_every_elf_of_a_module_is_changed():
    both = nn.ModuleDict({"a": elf(), "b": cut()})
    before = {name: c.bias.clone() for name, c in classifiers(both).items()}
    assert len(before) == 5
    adjust_logits_(both, COUNTS)
    for name, classifier in classifiers(both).items():
        torch.testing.assert_close(classifier.bias - before[name], -LOG_PRIOR.float())


# The normalised classifier


def test_cosines_and_their_gradient():
    torch.manual_seed(0)
    classifier = CosineClassifier(8, 4).double()
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    w = classifier.weight
    z = classifier(x)
    expected = torch.stack([torch.stack([a @ b / (a @ a * (b @ b)).sqrt() for b in w]) for a in x])
    torch.testing.assert_close(z, expected)
    for ours, exact in zip(
        torch.autograd.grad(z.pow(3).sum(), (x, w)),
        torch.autograd.grad(expected.pow(3).sum(), (x, w)),
        strict=True,
    ):
        torch.testing.assert_close(ours, exact)


@BOTH
def test_ldam_on_cosines_trains_every_exit(cls):
    model = elf(cls, exit_loss=losses.LDAMLoss(COUNTS, scale=10), temperatures=0.1, thresholds=0.9)
    use_cosine_(model)
    assert all(isinstance(c, CosineClassifier) for c in classifiers(model).values())
    z = logits_at_every_exit(model)
    assert bool((z.abs() <= 1 + 1e-6).all())
    sure = (10 * z).softmax(2).amax(2) >= 0.9
    sure[-1] = True
    exit_index = sure.int().argmax(0)
    assert len(exit_index.unique()) > 1 and torch.equal(model(X).exit_index, exit_index)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    history = []
    for _ in range(8):
        loss = model.train()(X, Y).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert all(c.weight.grad.any() for c in classifiers(model).values())
    assert history[-1] < 0.9 * history[0]


def test_a_cut_network_takes_cosines_in_its_last_stage():
    model = cut()
    use_cosine_(model)
    assert isinstance(model.get_submodule("stages.1.4"), CosineClassifier)
    assert bool((logits_at_every_exit(model).abs() <= 1 + 1e-6).all())
    assert isinstance(model.heads[0].classifier, CosineClassifier)


@pytest.mark.parametrize(
    "compute",
    [nn.utils.parametrizations.weight_norm, lambda m: prune.random_unstructured(m, "weight", 0.5)],
)
def test_weights_that_are_computed_train_and_are_not_written_over(compute):
    model = elf()
    linear = model.heads[1].classifier
    compute(linear)
    for method in (reset_classifiers_, learn_scales_, lambda m: tau_normalise_(m, 1.0)):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(TypeError, match="^heads.1.classifier: expected a weight that is a"):
            method(model)
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match="expected scales by learn_scales_"):
        fold_scales_(linear)
    train_classifiers(model)
    assert all(p.requires_grad for p in linear.parameters())


@pytest.mark.parametrize(
    "method",
    [reset_classifiers_, lambda m: tau_normalise_(m, 1.0), lambda m: adjust_logits_(m, COUNTS)],
)
def test_biases_that_are_computed_are_not_written_over(method):
    model = elf()
    prune.random_unstructured(model.heads[1].classifier, "bias", 0.5)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match="^heads.1.classifier: expected a bias that is a parameter"):
        method(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_scales_are_not_put_on_scales():
    model = elf()
    learn_scales_(model)
    with pytest.raises(TypeError, match=r"^heads.0.classifier: .* for LWS, got .* learn_scales_"):
        learn_scales_(model)


def cosine():
    model = elf()
    use_cosine_(model)
    return model


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: classifiers(nn.ReLU()), ValueError,
         "model: expected an nn.Linear or a CosineClassifier in it, got ReLU without one"),
        (lambda: classifiers(ELF([nn.Linear(3, 3)], [nn.Conv2d(3, 4, 1)])), ValueError,
         "heads.0: expected an nn.Linear .* got Conv2d without one"),
        (lambda: tau_normalise_(cosine(), 1.0), TypeError,
         r"heads.0.classifier: expected an nn.Linear for tau-normalisation, got CosineClassifier"),
        (lambda: tau_normalise_(elf(), -1.0), ValueError, "tau: expected a finite number >= 0.0"),
        (lambda: fold_scales_(elf()), ValueError, "heads.0.classifier: expected scales by learn_"),
        (lambda: adjust_logits_(elf(), [3, 2]), ValueError,
         "class_counts: expected 4, the classes of heads.0.classifier, got 2"),
        (lambda: LogitAdjustment(COUNTS, tau=-1), ValueError, "tau: expected a finite number"),
        (lambda: CosineClassifier(0, 4), ValueError, "in_features: expected an integer >= 1"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
