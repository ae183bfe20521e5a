"""Mixup and CutMix."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from run_cases import DIGITS

from elf_fast.losses import BalancedSoftmaxLoss
from elf_fast.runs.freezing import train_mode
from elf_fast.runs.networks import network
from elf_fast.training.learner import Learner
from elf_fast.training.mixing import Mixed, MixedLoss, Mixer, mixed_loss
from elf_fast.training.processes import Processes

pytest.importorskip("torchvision")
CPU = Processes(torch.device("cpu"))


@pytest.mark.parametrize("settings", [{"mixup": 0.4}, {"cutmix": 1.0}])
def test_images_are_mixed_as_their_shares_say(settings):
    torch.manual_seed(0)
    mixer = Mixer(replace(DIGITS, **settings))
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 8).contiguous()
    targets = torch.arange(4)
    for _ in range(10):
        batch = mixer(images, targets)
        share = batch.share
        assert ((share >= 0.5) & (share <= 1)).all()
        mean = batch.images.mean((1, 2, 3))
        assert torch.allclose(mean, share * batch.targets + (1 - share) * batch.others, atol=1e-5)
        pairs = torch.stack([batch.targets, batch.others]).sort(0).values
        assert torch.equal(pairs, torch.stack([targets, targets.roll(1)]).sort(0).values)


def test_both_kinds_take_turns():
    torch.manual_seed(0)
    mixer = Mixer(replace(DIGITS, mixup=0.4, cutmix=1.0))
    images = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 3, 8, 8).contiguous()
    blended = {
        bool(((x > 0) & (x < 1)).any())
        for x in (mixer(images, torch.tensor([0, 1])).images for _ in range(20))
    }
    assert blended == {True, False}


def test_the_loss_weighs_both_labels():
    z, y, others = torch.randn(3, 4), torch.tensor([0, 1, 2]), torch.tensor([3, 1, 0])
    share = torch.tensor([0.5, 0.7, 1.0])
    counts = [9, 5, 3, 1]
    loss = MixedLoss(BalancedSoftmaxLoss(counts), Mixed(z, y, others, share))
    soft = share[:, None] * F.one_hot(y, 4) + (1 - share[:, None]) * F.one_hot(others, 4)
    expected = F.cross_entropy(z + torch.tensor(counts).log(), soft, reduction="none")
    assert torch.allclose(loss(z, y), expected, atol=1e-6)
    with pytest.raises(ValueError, match="expected 3 samples, got 2"):
        loss(z[:2], y[:2])


@pytest.mark.parametrize(
    "criterion, thresholds, off",
    [("confidence", 0.0, math.inf), ("entropy", 1.0, -math.inf), (torch.sum, 0.0, math.inf)],
)
def test_no_sample_leaves_in_training(criterion, thresholds, off):
    config = replace(DIGITS, cutmix=1.0, criterion=criterion, thresholds=thresholds)
    model = network(config, [9] * 10)
    assert model.train_thresholds.tolist() == [off, off]
    assert model.thresholds.tolist() == [thresholds, thresholds]


@pytest.mark.parametrize("kept", [True, False])
def test_a_mixed_batch_goes_through_all_exits(kept):
    config = replace(DIGITS, mixup=1.0, drop_exited=not kept, thresholds=0.0)
    learner = Learner(config, network(config, [9] * 10), CPU)
    model = learner.model
    train_mode(model)
    torch.manual_seed(0)
    images, targets = torch.randn(6, 3, 16, 16), torch.arange(6)
    torch.manual_seed(1)
    batch = Mixer(config)(images, targets)
    expected, x = 0.0, batch.images
    with torch.no_grad():
        for stage, head in zip(model.stages, model.heads, strict=True):
            x = stage(x)
            z = head(x)
            first, second = (
                F.cross_entropy(z, y, reduction="none") for y in (batch.targets, batch.others)
            )
            expected += (batch.share * first + (1 - batch.share) * second).mean()
    torch.manual_seed(1)
    out, dominant = learner.forward(images, targets)
    assert torch.equal(dominant, batch.targets)
    assert (out.exit_index == len(model.stages) - 1).all()
    assert torch.allclose(out.loss, expected, atol=1e-5)
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_loss_comes_back_after_an_error():
    model = network(DIGITS, [9] * 10)
    loss = model.exit_loss
    batch = Mixed(torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.zeros(1))
    with pytest.raises(RuntimeError), mixed_loss(model, batch):
        raise RuntimeError
    assert model.exit_loss is loss
