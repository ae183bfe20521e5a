"""Milliseconds of the report."""

from __future__ import annotations

import pytest
import torch
from evaluations import opened

from elf_fast.page import speed


def test_each_setting_is_timed_with_its_thresholds_and_the_models_come_back():
    model = opened((5, 5), N=40).model
    reached = []
    model.stages[2].register_forward_hook(lambda module, x, y: reached.append(len(x[0])))
    before = model.thresholds.clone()
    images = torch.rand(40, 3, 4, 4)
    model.thresholds = 0.0  # all leave at exit 1
    found = speed.measure(model, images, 16, seconds=0)
    assert set(reached) == {16}  # only the whole network reaches the last stage
    reached.clear()
    never = torch.full_like(before, torch.inf)
    speed.measure(model, images, 16, [never], seconds=0)
    assert len(reached) > 2 * 9 * 2 - 4
    assert model.thresholds.tolist() == [0.0, 0.0]
    assert (found.batch, found.images, found.settings) == (16, 32, [])
    assert found.ratio.low <= found.ratio.value <= found.ratio.high
    assert found.where.startswith("cpu, ")


def test_few_images_make_one_batch_and_none_are_refused():
    model = opened((5, 5), N=40).model
    assert speed.measure(model, torch.rand(5, 3, 4, 4), 16, seconds=0).batch == 5
    with pytest.raises(ValueError, match="images: expected at least one"):
        speed.measure(model, torch.rand(0, 3, 4, 4), 16)


def test_a_large_network_is_timed_on_fewer_batches(monkeypatch):
    model = opened((5, 5), N=40).model
    monkeypatch.setattr(speed, "_SECONDS", 0.0)
    assert speed.measure(model, torch.rand(40, 3, 4, 4), 8, seconds=0).images == 8
