"""The network that settings give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from run_cases import DIGITS

from elf_fast.runs import networks


@pytest.mark.parametrize("loss", ["cross_entropy", "ldam"])
def test_without_exits_the_backbone_starts_with_the_same_weights(loss):
    settings = replace(DIGITS, loss=loss)
    plain = networks.network(replace(settings, exits=()), [10] * 10)
    elf = networks.network(settings, [10] * 10)
    assert len(plain.stages) == 1 and len(elf.stages) == 3
    theirs = elf.state_dict()
    ours = {k.split(".", 2)[2]: v for k, v in plain.state_dict().items() if k.startswith("stages.")}
    for stage in range(3):
        for key, value in theirs.items():
            if key.startswith(f"stages.{stage}."):
                assert torch.equal(ours.pop(key.split(".", 2)[2]), value), key
    assert not ours


def test_ldam_reads_cosines_at_its_own_scale():
    model = networks.network(replace(DIGITS, loss="ldam", ldam_scale=20.0), [10] * 10)
    assert model.temperatures.tolist() == pytest.approx([0.05] * 2)
    out = model.eval()(torch.randn(8, 3, 16, 16))
    assert out.logits.abs().max() <= 1 + 1e-6


def test_under_ldam_the_test_in_training_has_the_margins():
    ldam = replace(DIGITS, loss="ldam", drw_epoch=0, thresholds=(0.7,))
    for changes, thresholds in (
        ({}, 0.7),
        ({"train_thresholds": (0.8,)}, 0.8),
        ({"train_thresholds": (0.8, 0.6)}, [0.8, 0.6]),
    ):
        model = networks.network(replace(ldam, **changes), list(range(10, 20)))
        wanted = model.exit_loss.margin_thresholds(thresholds).expand(2, 10)
        assert torch.equal(model.train_thresholds, wanted)
        assert model.thresholds.tolist() == pytest.approx([0.7, 0.7])
    model = networks.network(replace(ldam, criterion="margin"), [10] * 10)
    assert model.train_thresholds.tolist() == pytest.approx([0.7, 0.7])
