"""One run: what the networks of a pair have in common, how each trains, and its record."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("torchmetrics")

from accuracy_helpers import BRIEF, variants
from torch import nn

from benchmarks.accuracy import runs, trial
from elf_fast import losses
from elf_fast.classifiers import CosineClassifier
from elf_fast.data.digits import augment
from elf_fast.demo import run as demo
from elf_fast.demo.loop import EpochStats, Schedule, train
from elf_fast.flops import count_flops


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with demo.one_thread():
        yield


@pytest.mark.parametrize("loss", ["ce", "ldam_drw"])
@pytest.mark.parametrize("head", runs.CONVOLUTIONS)
def test_variants_start_from_the_same_weights(loss, head):
    models = {
        name: trial.build(r, [9, 5, 1], epochs=1)
        for name, r in variants(loss=loss, head=head).items()
    }
    keep = models.pop("keep")
    plain = models.pop("plain")
    stages = nn.Sequential(*keep.stages).state_dict()
    assert plain.stages[0].state_dict().keys() == stages.keys()
    for name, value in plain.stages[0].state_dict().items():
        assert torch.equal(value, stages[name])
    for name, value in plain.heads[0].state_dict().items():
        assert torch.equal(value, keep.heads[-1].state_dict()[name])
    weights = dict(keep.named_parameters())
    for model in models.values():
        for name, value in model.named_parameters():
            assert torch.equal(value, weights[name])
    other = trial.build(variants(loss=loss, head=head, seed=4)["keep"], [9, 5, 1], epochs=1)
    assert not torch.equal(next(other.parameters()), next(keep.parameters()))


def test_variants_see_the_same_samples_in_the_same_order(monkeypatch):
    batches: list[torch.Tensor] = []

    def watched(images, generator):
        batches.append(augment(images, generator))
        return batches[-1]

    monkeypatch.setattr("elf_fast.demo.loop.augment", watched)
    seen = {}
    for name, r in variants().items():
        if name in runs.TABLE:
            batches.clear()
            data = trial.split(r.imbalance, r.seed)
            train(trial.build(r, data.class_counts, 1), data.train, BRIEF, seed=r.seed)
            seen[name] = torch.cat(batches)
    assert len(seen["plain"]) == 254
    assert torch.equal(seen["plain"], seen["keep"]) and torch.equal(seen["plain"], seen["drop"])


def test_a_seed_has_its_own_digits_for_every_imbalance():
    at_100, at_10, other = trial.split(100, 0), trial.split(10, 0), trial.split(100, 1)
    assert torch.equal(at_100.test.position, at_10.test.position)
    assert at_100.class_names == at_10.class_names != other.class_names
    assert set(at_100.test.position.tolist()) != set(other.test.position.tolist())


def test_losses_and_temperatures_are_those_of_the_method():
    model = trial.build(variants(loss="ldam_drw")["keep"], [9, 5, 1], epochs=10)
    assert isinstance(model.exit_loss, losses.DeferredReweighting)
    assert model.exit_loss.start_epoch == 8 and model.exit_loss.scale == 30
    assert model.temperatures.tolist() == pytest.approx([1 / 30, 1 / 30])
    assert all(isinstance(head.classifier, CosineClassifier) for head in model.heads)
    model = trial.build(variants(loss="balanced_softmax")["keep"], [9, 5, 1], epochs=10)
    assert isinstance(model.exit_loss, losses.BalancedSoftmaxLoss)
    assert model.temperatures.tolist() == [1, 1]


def test_logit_adjustment_in_the_loss_is_balanced_softmax():
    """So the table has logit adjustment post hoc only."""
    z = torch.randn(20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(20) % 5
    counts = [50, 20, 8, 3, 1]
    torch.testing.assert_close(
        losses.LogitAdjustedLoss(counts)(z, y), losses.BalancedSoftmaxLoss(counts)(z, y)
    )


@pytest.fixture(scope="module")
def record():
    """Of a run with LDAM-DRW: exits, cosines, temperatures."""
    return trial.perform(variants(loss="ldam_drw")["keep"], BRIEF)


def test_a_run_repeats(record):
    again = trial.perform(variants(loss="ldam_drw")["keep"], BRIEF)
    for either in (record, again):
        assert either["seconds"] > 0
        assert either["environment"]["threads"] == "1"
    varies = {"seconds", "environment"}
    assert record.keys() - varies == again.keys() - varies
    for key in record.keys() - varies:
        assert record[key] == again[key], key


def test_a_record_has_every_metric_at_every_operating_point(record):
    assert set(record["test"]) == {"full", "safe", "best"}
    assert record["class_counts"] == [104, 62, 37, 22, 13, 8, 4, 2, 1, 1]
    assert record["thresholds"]["full"] is None
    assert record["test"]["full"]["exit_shares"] == [0, 0, 1]
    assert record["test"]["full"]["flops_share"] > 1  # it counts the heads as well
    for point in record["test"].values():
        assert set(point) == set(trial.KEPT)
        assert point["overall"] * 500 == pytest.approx(
            50 * point["many"] + 150 * point["medium"] + 300 * point["few"], abs=0.01
        )
    assert record["test"]["best"]["flops_share"] < record["test"]["full"]["flops_share"]
    assert record["validation"]["safe"] >= record["validation"]["full"]
    assert record["validation"]["best"] >= record["validation"]["safe"]


def test_what_changes_during_training(monkeypatch):
    """DRW weights the classes in the last fifth of the epochs; drop-late opens its exits after
    half of them."""
    even, thresholds = [], []

    def without_training(model, data, schedule, *, seed, on_epoch):
        history = [EpochStats(epoch, 1.0, 0.5, [1.0]) for epoch in range(1, schedule.epochs + 1)]
        for epoch in history:
            even.append(bool((model.exit_loss.weight == 1).all()))
            thresholds.append(model.train_thresholds[0, 0].item())
            on_epoch(epoch)
        return history

    monkeypatch.setattr(trial, "train", without_training)
    trial.perform(variants(loss="ldam_drw")["drop-late"], Schedule(epochs=5))
    assert even == [True] * 4 + [False]
    assert thresholds == pytest.approx([math.inf] * 3 + [0.9] * 2)


def test_margins_are_in_the_exit_test_of_keep_margin_alone():
    models = {
        name: trial.build(variants(loss="ldam_drw")[name], [90, 30, 2], epochs=1)
        for name in ("keep", "keep-margin")
    }
    assert torch.equal(models["keep"].train_thresholds, torch.full((2, 3), 0.9))
    wanted = models["keep-margin"].exit_loss.margin_thresholds([0.9, 0.9])
    assert torch.equal(models["keep-margin"].train_thresholds, wanted)


@pytest.mark.parametrize("head, strides", [("pooled", []), ("conv", [2]), ("deep", [2, 1])])
def test_heads_have_their_convolutions(head, strides):
    model = trial.build(variants(head=head)["keep"], [9, 5, 1], epochs=1)
    for part in model.heads:
        found = [m.stride[0] for m in part.modules() if isinstance(m, nn.Conv2d)]
        assert found == strides
    assert model.eval()(torch.rand(8, 1, 16, 16)).logits.shape == (8, 3)


def test_a_softened_test_reads_the_logits_at_a_third_of_the_scale():
    model = trial.build(variants(loss="ldam_drw")["keep-soft"], [9, 5, 1], epochs=1)
    assert model.temperatures.tolist() == pytest.approx([0.1, 0.1])
    assert model.exit_loss.scale == 30


def test_batch_norm_keeps_its_statistics_on_small_batches():
    model = trial.build(variants()["drop-rest"], [9, 5, 1], epochs=1).train()
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    x = torch.randn(32, norm.num_features, 4, 4)
    before = norm.running_mean.clone()
    torch.testing.assert_close(norm(x[:31]), norm.eval()(x[:31]))
    assert torch.equal(norm.running_mean, before)
    assert norm.train()(x).mean().abs() < 1e-5 and not torch.equal(norm.running_mean, before)
    norm(x[:31])
    assert norm.training


def test_post_hoc_logit_adjustment_moves_every_exit_towards_the_tail(monkeypatch):
    monkeypatch.setattr(trial, "train", lambda *_, **__: [EpochStats(1, 1.0, 0.5, [1.0])])
    adjusted = []

    def watched(model, sample):
        adjusted.append(model)
        return count_flops(model, sample)

    monkeypatch.setattr(trial, "count_flops", watched)
    r = variants(loss="logit_adjustment")["keep"]
    trial.perform(r, BRIEF)
    counts = torch.tensor([104, 62, 37, 22, 13, 8, 4, 2, 1, 1.0])
    before = trial.build(r, counts.int().tolist(), 1)
    for head, start in zip(adjusted[0].heads, before.heads, strict=True):
        shift = head.classifier.bias - start.classifier.bias
        torch.testing.assert_close(shift, -(counts / counts.sum()).log())
