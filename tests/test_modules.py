"""`ELF` follows the specification, and the fused module is a drop-in for the reference."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import elf_fast
from elf_fast import ELF, ExitHead, criteria, losses, reference
from elf_fast.bench.workload import inference_work, training_work

BOTH = pytest.mark.parametrize("cls", [reference.ELF, ELF], ids=["reference", "elf_fast"])


class Constant(nn.Module):
    """A head that looks its logits up by the sample's first value."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(torch.tensor(table))

    def forward(self, x):
        return self.table[x[:, 0].long()]


class ScaledNorm(nn.Module):
    """A criterion that has a parameter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, logits):
        return self.scale * logits.norm(dim=1)


def lookup(cls, tables, **options):
    return cls([nn.Identity() for _ in tables], [Constant(t) for t in tables], **options)


SURE, UNSURE = [6.0, 0.0, 0.0], [0.1, 0.0, 0.0]
SAMPLES = torch.tensor([[0.0], [1.0], [2.0], [0.0]])


@BOTH
def test_a_sample_leaves_at_its_first_passing_exit_and_order_is_restored(cls):
    model = lookup(
        cls, [[UNSURE, SURE, UNSURE], [UNSURE, UNSURE, SURE], [UNSURE] * 3], thresholds=0.9
    ).eval()
    out = model(SAMPLES)
    assert out.exit_index.tolist() == [2, 0, 1, 2]
    assert out.loss is None
    p = 1 / (1 + 2 * math.exp(-6))
    torch.testing.assert_close(out.confidence[1:3], torch.tensor([p, p]))
    assert out.confidence.dtype == torch.float32 and out.exit_index.dtype == torch.int64
    assert torch.equal(out.logits[1], torch.tensor(SURE))


@BOTH
@pytest.mark.parametrize("drop_exited", [True, False])
def test_training_asks_for_a_right_prediction_and_sums_the_losses(cls, drop_exited):
    tables = [[SURE, SURE, UNSURE], [SURE, SURE, UNSURE], [UNSURE] * 3]
    model = lookup(
        cls, tables, thresholds=0.9, exit_weights=[1.0, 2.0, 3.0], drop_exited=drop_exited
    )
    target = torch.tensor([0, 1, 0, 0])  # sample 1 is sure and wrong
    out = model.train()(SAMPLES, target)
    assert out.exit_index.tolist() == [0, 2, 2, 0]

    def ce(row, y):
        return float(torch.logsumexp(torch.tensor(row), 0) - row[y])

    expected = (
        2 * ce(SURE, 0)
        + (1 + 2) * ce(SURE, 1) + 3 * ce(UNSURE, 1)
        + (1 + 2 + 3) * ce(UNSURE, 0)
    ) / 4  # fmt: skip
    assert out.loss.item() == pytest.approx(expected, rel=1e-6)
    out = model.eval()(SAMPLES, target)  # in evaluation right or wrong plays no part
    assert out.exit_index.tolist() == [0, 0, 2, 0]
    assert out.loss is not None


@BOTH
def test_per_exit_and_per_class_thresholds_and_temperatures(cls):
    tables = [[SURE, [0.0, 6.0, 0.0], UNSURE]] * 3
    per_exit = lookup(cls, tables, thresholds=[1.0, 0.9]).eval()(SAMPLES)
    assert per_exit.exit_index.tolist() == [1, 1, 2, 1]
    per_class = lookup(cls, tables, thresholds=[[0.9, 1.0, 0.9], [0.9, 0.9, 0.9]]).eval()(SAMPLES)
    assert per_class.exit_index.tolist() == [0, 1, 2, 0]
    hot = lookup(cls, tables, thresholds=0.9, temperatures=[10.0, 1.0]).eval()(SAMPLES)
    assert hot.exit_index.tolist() == [1, 1, 2, 1]
    off = lookup(cls, tables, thresholds=math.inf).eval()(SAMPLES)
    assert off.exit_index.tolist() == [2, 2, 2, 2]
    model = lookup(cls, tables, thresholds=0.9, train_thresholds=math.inf)
    assert model.train()(SAMPLES).exit_index.tolist() == [2, 2, 2, 2]
    assert model.eval()(SAMPLES).exit_index.tolist() == [0, 0, 2, 0]


@BOTH
@pytest.mark.parametrize(
    "criterion, t",
    [("margin", 0.9), ("entropy", 0.2), (lambda z: z.amax(dim=1), 5.9), (ScaledNorm(), 2.9)],
    ids=["margin", "entropy", "function", "module"],
)
def test_criteria(cls, criterion, t):
    model = lookup(cls, [[SURE, UNSURE, SURE]] * 2, thresholds=t, criterion=criterion).eval()
    assert model(SAMPLES).exit_index.tolist() == [0, 1, 0, 0]
    target = torch.tensor([0, 0, 1, 0])  # sample 2 is sure and wrong
    model.train_thresholds = t
    out = model.train()(SAMPLES, target)
    assert out.exit_index.tolist() == [0, 1, 1, 0]
    out.loss.backward()
    assert model.heads[0].table.grad.abs().sum() > 0


@BOTH
def test_a_criterion_of_the_users_gets_logits_by_temperature_and_is_switched_off(cls):
    seen = []

    def score(z):
        seen.append(z.detach().clone())
        return torch.full((len(z),), math.inf)

    model = lookup(cls, [[SURE, SURE, SURE]] * 2, temperatures=2.0, criterion=score)
    model.thresholds = math.inf
    out = model.eval()(SAMPLES)
    assert out.exit_index.tolist() == [1] * 4  # a score of inf does not pass a threshold of inf
    assert torch.equal(seen[0], torch.tensor([SURE] * 4) / 2)
    model.thresholds = 1e30
    assert model(SAMPLES).exit_index.tolist() == [0] * 4
    model.criterion = lambda z: z
    with pytest.raises(ValueError, match=r"criterion: expected scores of shape \[4\], one per"):
        model(SAMPLES)


@BOTH
def test_under_a_criterion_of_the_users_nan_goes_on(cls):
    tables = [[[math.nan, 0.0, 0.0], SURE, SURE]] * 2
    model = lookup(cls, tables, criterion=lambda z: torch.ones(len(z)), thresholds=0.5).eval()
    assert model(SAMPLES).exit_index.tolist() == [1, 0, 0, 1]


@BOTH
@pytest.mark.parametrize("threshold", [0.9, math.inf])
def test_the_first_head_gives_the_dtype_whichever_samples_leave(cls, threshold):
    model = lookup(cls, [[SURE, UNSURE, UNSURE], [SURE] * 3], thresholds=threshold).eval()
    model.heads[0].to(torch.bfloat16)
    with torch.no_grad():
        out = model(SAMPLES)
    assert out.logits.dtype == torch.bfloat16
    assert out.exit_index.tolist() == ([0, 1, 1, 0] if threshold < 1 else [1] * 4)


@BOTH
def test_nan_goes_on_to_the_end(cls):
    nan = [math.nan, 9.0, 0.0]
    out = lookup(cls, [[nan, SURE, SURE]] * 2, thresholds=0.0).eval()(SAMPLES)
    assert out.exit_index.tolist() == [1, 0, 0, 1]
    assert out.confidence.isnan().tolist() == [True, False, False, True]


def cnn(cls, *, exits=3, classes=5, channels=8, norm=True, head=ExitHead, seed=0, **options):
    torch.manual_seed(seed)
    stages, heads = [], []
    for e in range(exits):
        layers = [nn.Conv2d(3 if e == 0 else channels, channels, 3, padding=1)]
        layers += [nn.BatchNorm2d(channels)] if norm else []
        stages.append(nn.Sequential(*layers, nn.ReLU()))
        heads.append(head(channels, classes))
        for p in heads[-1].parameters():
            nn.init.normal_(p, std=2.0)
    return cls(stages, heads, **options)


def generic_head(D, C):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(D, C))


@BOTH
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("criterion", [*criteria.TABLE])
def test_empty_batch(cls, training, criterion):
    model = cnn(cls, criterion=criterion).train(training)
    before = copy.deepcopy(model.state_dict())
    out = model(torch.randn(0, 3, 6, 6), torch.zeros(0, dtype=torch.int64))
    assert [t.shape for t in out[:4]] == [(0, 5), (0,), (0,), (0,)]
    assert out.loss.item() == 0.0
    out.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training is training and all(m.training is training for m in model.modules())


@BOTH
def test_everyone_leaving_ends_the_forward_pass(cls):
    class Unreachable(nn.Module):
        def forward(self, x):
            raise AssertionError("a stage ran without samples")

    model = cls([nn.Identity(), Unreachable()], [Constant([SURE] * 3)] * 2, thresholds=0.5).eval()
    assert model(SAMPLES).exit_index.tolist() == [0, 0, 0, 0]


@BOTH
@pytest.mark.parametrize(
    ("norm", "drop_exited", "in_training"),
    [
        (nn.Identity(), None, [4, 3, 2]),
        (nn.LayerNorm(1), None, [4, 3, 2]),
        (nn.BatchNorm1d(1), None, [4, 4, 4]),
        (nn.BatchNorm1d(1).eval(), None, [4, 3, 2]),  # frozen
        (nn.BatchNorm1d(1, track_running_stats=False).eval(), None, [4, 4, 4]),
        (nn.Identity(), False, [4, 4, 4]),
        (nn.BatchNorm1d(1), True, [4, 3, 2]),
    ],
)
@pytest.mark.parametrize("place", ["stage 0", "stage 2", "head 1"])
def test_which_samples_are_dropped_in_training(cls, norm, drop_exited, in_training, place):
    """By default none, if a stage or head behind an early exit normalises by the batch."""
    sizes = []

    class Spy(nn.Module):
        def forward(self, x):
            sizes.append(len(x))
            return x

    tables = [[UNSURE, SURE, UNSURE], [UNSURE, UNSURE, SURE], [UNSURE] * 3]
    stages, heads = [Spy(), Spy(), Spy()], [Constant(t) for t in tables]
    part = {"stage 0": stages[0], "stage 2": stages[2], "head 1": heads[1]}[place]
    part.norm = norm
    training = norm.training
    model = cls(stages, heads, drop_exited=drop_exited)
    model.eval()(SAMPLES)
    by_batch = isinstance(norm, nn.BatchNorm1d) and norm.running_mean is None
    assert sizes == ([4, 4, 4] if by_batch and place != "stage 0" else [4, 3, 2])
    sizes.clear()
    model.train()
    norm.train(training)
    model(SAMPLES, torch.zeros(4, dtype=torch.int64))
    assert sizes == ([4, 3, 2] if place == "stage 0" and drop_exited is None else in_training)


@BOTH
def test_a_lone_survivor_passes_batch_norm(cls):
    """One sample of one pixel has no batch statistics: one exited sample is added with weight 0."""
    seen = []

    class Norm(nn.BatchNorm1d):
        def forward(self, x):
            seen.append(x[:, 0].tolist())
            return super().forward(x)

    def model(survivor):
        first = [SURE if i != survivor else UNSURE for i in range(3)]
        stages = [nn.Identity(), Norm(1), nn.Identity()]
        heads = [Constant(first), nn.Linear(1, 3), nn.Linear(1, 3)]
        return cls(stages, heads, thresholds=[0.9, 1.0], drop_exited=True)

    x, y = torch.tensor([[0.0], [1.0], [2.0]]), torch.zeros(3, dtype=torch.int64)
    for survivor, together in ((0, [0.0, 1.0]), (1, [0.0, 1.0]), (2, [0.0, 2.0])):
        torch.manual_seed(0)
        elf = model(survivor).train()
        out = elf(x, y)
        out.loss.backward()
        assert seen.pop() == together
        assert out.exit_index.tolist() == [2 if i == survivor else 0 for i in range(3)]
        with torch.no_grad():
            normed = torch.nn.functional.batch_norm(
                torch.tensor(together)[:, None], None, None, training=True
            )[together.index(float(survivor))]
            expected = reference.exit_loss(elf.heads[0](x), y).loss.sum()
            for head in elf.heads[1:]:
                expected += reference.exit_loss(head(normed[None]), y[:1]).loss.sum()
        assert out.loss.item() == pytest.approx(expected.item() / 3, rel=1e-5)
        elf.eval()(x)
        assert seen.pop() == [float(survivor)]  # in evaluation no sample is added


def test_dropping_and_keeping_agree_without_batch_statistics():
    x, y = torch.randn(40, 3, 6, 6), torch.randint(0, 5, (40,))
    results = []
    for drop in (True, False):
        model = cnn(ELF, norm=False, thresholds=0.4, drop_exited=drop).train()
        out = model(x, y)
        out.loss.backward()
        assert 0 < int((out.exit_index < 2).sum()) < 40
        results.append((out.loss, out.exit_index, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1])


def test_confident_samples_stop_weighing_on_the_loss():
    """Hard samples weigh more, whatever their class: their loss counts at every exit."""
    tables = [[SURE, UNSURE, UNSURE]] * 3
    model = lookup(ELF, tables, thresholds=0.9).train()
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([0, 0])
    model(x, y).loss.backward()
    for e, head in enumerate(model.heads):
        assert bool(head.table.grad[0].any()) == (e == 0)
        assert bool(head.table.grad[1].any())


EXIT_LOSSES = {
    "default": lambda C: None,
    "callable": lambda C: nn.CrossEntropyLoss(reduction="none"),
    "focal": lambda C: losses.FocalLoss(2.0),
    "LDAM": lambda C: losses.LDAMLoss(list(range(1, C + 1)), scale=4.0),
    "balanced": lambda C: losses.BalancedSoftmaxLoss(list(range(1, C + 1))),
}


def away_from_ties(model, x) -> torch.Tensor:
    """Samples whose statistic is at no exit within 1e-4 of the threshold, in float64."""
    exact = copy.deepcopy(model).double()
    clear = torch.ones(len(x), dtype=torch.bool, device=x.device)
    z, thresholds = x.double(), exact._active_thresholds()
    for e in range(len(exact.stages) - 1):
        z = exact.stages[e](z)
        stat = reference.statistic(exact.heads[e](z), exact.temperatures[e], exact.criterion)
        t = thresholds[e]
        t = t[exact.heads[e](z).argmax(1)] if t.dim() else t
        clear &= (stat - t).abs() > 1e-4
    return clear


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    N=st.integers(1, 40),
    exits=st.integers(1, 4),
    classes=st.integers(1, 12),
    criterion=st.sampled_from([*criteria.TABLE]),
    threshold=st.sampled_from([0.25, 0.5, 0.75, "off", "everyone"]),
    per_class=st.booleans(),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    exit_loss=st.sampled_from(list(EXIT_LOSSES)),
    drop_exited=st.booleans(),
    training=st.booleans(),
    channels_last=st.booleans(),
    head=st.sampled_from([ExitHead, generic_head]),
)
def test_drop_in(
    seed, N, exits, classes, criterion, threshold, per_class, temperature, dtype, exit_loss,
    drop_exited, training, channels_last, head,
):  # fmt: skip
    """Exit index, prediction, logits, loss and every gradient agree on random networks. A number as
    threshold: that share of the samples at each exit goes on."""
    row = criteria.by_name(criterion)
    t = {"off": row.off, "everyone": row.everyone}.get(threshold, 0.5)
    if per_class:
        t = torch.full((exits - 1, classes), t)
    model = cnn(
        reference.ELF, exits=exits, classes=classes, norm=N > 1, head=head, seed=seed, thresholds=t,
        temperatures=temperature, criterion=criterion, drop_exited=drop_exited,
        exit_loss=EXIT_LOSSES[exit_loss](classes),
    ).to(dtype).train(training)  # fmt: skip
    x = torch.randn(N, 3, 6, 6, dtype=dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
        model.to(memory_format=torch.channels_last)
    target = torch.randint(0, classes, (N,))
    if isinstance(threshold, float):
        assume(N * classes > 1)  # a workload scales logits by their standard deviation
        if training:
            model, _, target, _ = training_work(model, x, threshold)
        else:
            model = inference_work(model, x, threshold).model
        if per_class and exits > 1:
            apart = torch.linspace(-0.04, 0.04, classes)
            model.thresholds = (model.thresholds + apart).clamp(row.low, row.high)
    assume(bool(away_from_ties(model, x).all()))
    assert_drop_in(model, x, target)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("drop_exited", [True, False], ids=["dropping", "keeping"])
@pytest.mark.parametrize("head", [ExitHead, generic_head], ids=["fused", "generic"])
@pytest.mark.parametrize("exit_loss", ["default", "LDAM"])
def test_drop_in_on_every_backend(device, exit_loss, head, drop_exited, training):
    model = cnn(
        reference.ELF, classes=7, head=head, thresholds=0.5, drop_exited=drop_exited,
        exit_loss=EXIT_LOSSES[exit_loss](7), seed=15,
    ).to(device).train(training)  # fmt: skip
    x, y = torch.randn(33, 3, 6, 6), torch.randint(0, 7, (33,))
    assert bool(away_from_ties(model, x.to(device)).all())
    shares = assert_drop_in(model, x.to(device), y.to(device)).bincount(minlength=3)
    assert bool((shares > 0).all()), "an exit that no sample takes is not tested"


def assert_drop_in(model: reference.ELF, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The fused `model` agrees with it on samples whose statistic is not too close to a threshold.
    Returns the exit indices."""
    fused = elf_fast.fuse(copy.deepcopy(model))
    tolerance = (
        {"rtol": 1e-4, "atol": 1e-5} if x.dtype == torch.float32 else {"rtol": 1e-6, "atol": 1e-8}
    )
    expected, out = model(x, y), fused(x, y)
    assert torch.equal(out.exit_index, expected.exit_index)
    assert torch.equal(out.prediction, expected.prediction)
    torch.testing.assert_close(out.logits, expected.logits, **tolerance)
    torch.testing.assert_close(out.confidence, expected.confidence, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.loss, expected.loss, **tolerance)
    for twin in (model, fused):
        twin.zero_grad()
    (expected.loss + expected.logits.square().mean()).backward()
    (out.loss + out.logits.square().mean()).backward()
    for (name, p), q in zip(model.named_parameters(), fused.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, **tolerance)
    with torch.no_grad():
        served, plain = fused.eval()(x), model.eval()(x)
    clear = away_from_ties(model, x)  # in evaluation samples do not depend on each other
    assert torch.equal(served.exit_index[clear], plain.exit_index[clear])
    torch.testing.assert_close(served.logits[clear], plain.logits[clear], **tolerance)
    return out.exit_index


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_autocast_follow_the_reference(dtype):
    x = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    model = elf_fast.unfuse(inference_work(cnn(ELF), x, 0.5).model)
    with torch.inference_mode(), torch.autocast("cpu", dtype=dtype):
        plain, fast = model(x), elf_fast.fuse(model)(x)
    assert bool((plain.exit_index.bincount(minlength=3) > 8).all())
    same = plain.exit_index == fast.exit_index
    assert same.sum() >= 62  # a tie within the dtype's rounding may differ
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(fast.logits[same], plain.logits[same], rtol=rounding, atol=rounding)


def test_settings_are_buffers_and_keep_their_precision():
    model = cnn(ELF, thresholds=0.9, train_thresholds=0.3)
    assert {"thresholds", "train_thresholds", "temperatures"} <= set(model.state_dict())
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert model.to(dtype).thresholds.dtype == torch.float32
        assert model.thresholds.tolist() == pytest.approx([0.9, 0.9], abs=1e-7)
        assert next(model.parameters()).dtype == dtype
    assert model.to("meta").thresholds.is_meta


def test_state_dict_loads_both_ways():
    plain, fast = cnn(reference.ELF, seed=1, thresholds=0.3), cnn(ELF, seed=2, thresholds=0.8)
    assert list(plain.state_dict()) == list(fast.state_dict())
    for source, model in ((plain, fast), (cnn(ELF, seed=3, thresholds=0.6), plain)):
        model.load_state_dict(source.state_dict())
        assert model.state_dict().keys() == source.state_dict().keys()
        for name, value in source.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name


def test_fuse_and_unfuse_round_trip_and_share():
    plain = cnn(reference.ELF)
    outer = nn.Sequential(nn.Identity(), plain)
    fused = elf_fast.fuse(outer)
    assert type(fused[1]) is ELF and type(outer[1]) is reference.ELF
    assert fused[1].stages is plain.stages and fused[1].thresholds is plain.thresholds
    back = elf_fast.unfuse(fused)
    assert type(back[1]) is reference.ELF
    assert list(back.state_dict()) == list(outer.state_dict())
    fused.eval()
    assert fused[1].training is False and plain.training is True


def test_hooks_and_replaced_classifiers_still_run():
    """The fused head must not bypass hooks and modules that a user added to it."""
    model = cnn(ELF, thresholds=[0.9, 0.28]).eval()
    seen = []
    model.heads[0].register_forward_hook(lambda *_: seen.append("head"))
    model.heads[1].classifier = nn.Sequential(nn.Linear(8, 5), nn.Tanh())
    x = torch.randn(20, 3, 6, 6)
    expected = elf_fast.unfuse(model)(x)
    assert expected.exit_index.unique().tolist() == [0, 1, 2]
    seen.clear()
    out = model(x)
    assert seen == ["head"]
    torch.testing.assert_close(out.logits, expected.logits)


def test_backward_hooks_of_a_head_run():
    model = cnn(ELF, thresholds=0.9).eval()
    seen = []
    model.heads[0].register_full_backward_hook(lambda *_: seen.append("head"))
    model.heads[1].classifier.register_full_backward_pre_hook(lambda *_: seen.append("classifier"))
    out = model(torch.randn(20, 3, 6, 6))
    assert set(out.exit_index.tolist()) >= {0, 2}
    out.logits.sum().backward()
    assert sorted(seen) == ["classifier", "head"]


@BOTH
def test_a_loss_with_a_forward_of_its_own_is_called(cls):
    class Doubled(losses.FocalLoss):
        def forward(self, logits, target):
            return 2 * super().forward(logits, target)

    class Stranger(nn.CrossEntropyLoss):
        arguments = None  # an attribute as elf_fast.losses has one

    x, y = torch.randn(20, 3, 6, 6), torch.randint(0, 5, (20,))

    def loss(exit_loss):
        return cnn(cls, thresholds=0.6, exit_loss=exit_loss).train()(x, y).loss

    torch.testing.assert_close(
        loss(Doubled(reduction="none")), 2 * loss(losses.FocalLoss(reduction="mean"))
    )
    torch.testing.assert_close(loss(Stranger(reduction="none")), loss(None))


@BOTH
@pytest.mark.parametrize("exit_loss", EXIT_LOSSES)
@pytest.mark.parametrize("training", [True, False])
def test_targets_may_lie_apart_in_memory(cls, exit_loss, training):
    model = cnn(cls, thresholds=0.6, exit_loss=EXIT_LOSSES[exit_loss](5)).train(training)
    x, y = torch.randn(20, 3, 6, 6), torch.randint(0, 5, (20, 2))
    model(x, y[:, 0].contiguous())  # moves the running statistics, which training does not read
    for apart in (y[:, 0], y[:1, 1].expand(20)):
        expected = model(x, apart.contiguous())
        torch.testing.assert_close(model(x, apart), expected, equal_nan=True)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_thresholds_of_any_dtype_may_be_put_in_place(cls, dtype):
    model = cnn(cls, thresholds=0.625, temperatures=2.0).eval()
    x = torch.randn(20, 3, 6, 6)
    expected = model(x)
    assert len(expected.exit_index.unique()) > 1
    model.thresholds = torch.tensor([0.625, 0.625], dtype=dtype)
    model.temperatures = torch.tensor([2.0, 2.0], dtype=dtype)
    assert torch.equal(model(x).exit_index, expected.exit_index)
    half = {name: value.to(dtype) for name, value in model.state_dict().items()}
    model.load_state_dict(half, assign=True)
    model(x.to(dtype))


def test_the_whole_network_compiles():
    """Also in evaluation with gradients enabled, where no result is backpropagated."""
    torch.compiler.reset()
    model = cnn(ELF, exits=2, norm=False, head=generic_head, thresholds=0.9).eval()
    x = torch.randn(20, 3, 6, 6)
    expected, out = model(x), torch.compile(model, backend="aot_eager")(x)
    assert len(expected.exit_index.unique()) == 2
    torch.testing.assert_close(out, expected)
    grads = []
    for value in (expected, out):
        model.zero_grad()
        value.logits.square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("keeper", [0, 1])
def test_a_tensor_that_a_head_keeps_is_not_written_into(keeper):
    """At the first exit, and at the first exit where a sample leaves."""

    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.kept = torch.tensor([UNSURE, SURE, UNSURE, UNSURE])

        def forward(self, x):
            return self.kept

    heads = [Constant([UNSURE] * 3) for _ in range(keeper)] + [
        Keeps(),
        Constant([[0.3, 0.2, 0.1]] * 3),
    ]
    model = ELF([nn.Identity() for _ in heads], heads, thresholds=0.9).eval()
    before = heads[keeper].kept.clone()
    with torch.inference_mode():
        out = model(SAMPLES)
    assert out.exit_index.tolist() == [keeper + 1, keeper, keeper + 1, keeper + 1]
    assert torch.equal(heads[keeper].kept, before)


def test_user_tensors_are_left_alone():
    """Inputs and a head's own tensors are not written into."""
    model = lookup(ELF, [[UNSURE, SURE, UNSURE]] * 2, thresholds=0.9).eval()
    tables = [head.table.detach().clone() for head in model.heads]
    x = SAMPLES.clone()
    with torch.inference_mode():
        model(x)
    assert torch.equal(x, SAMPLES)
    assert all(torch.equal(h.table, t) for h, t in zip(model.heads, tables, strict=True))


def test_copies_and_pickles():
    import pickle

    model = cnn(ELF).eval()
    x = torch.randn(5, 3, 6, 6)
    out = model(x)
    assert len(out.exit_index.unique()) > 1
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), out, rtol=0, atol=0)
