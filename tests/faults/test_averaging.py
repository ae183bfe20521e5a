"""Tools that average models leave exits off that are off, in what runs, is read and is saved."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

from elf_fast import ELF, ExitHead, fuse, reference

BOTH = pytest.mark.parametrize("cls", [reference.ELF, ELF], ids=["reference", "elf_fast"])
X, Y = torch.randn(9, 4, generator=torch.Generator().manual_seed(2)), torch.arange(9) % 3


def elf(cls, **options):
    torch.manual_seed(0)
    stages = [nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 4)), nn.Linear(4, 4)]
    return cls(stages, [ExitHead(4, 3) for _ in stages], **options)


def _torch_ema(model, step):
    decay = swa_utils.get_ema_multi_avg_fn(0.7)
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=decay, use_buffers=True)
    for _ in range(4):
        step(model)
        averaged.update_parameters(model)
    return averaged.module


def _torch_swa(model, step):
    averaged = swa_utils.AveragedModel(model, use_buffers=True)
    for _ in range(4):
        step(model)
        averaged.update_parameters(copy.deepcopy(model))
    return averaged.module


def _timm(model, step, **options):
    utils = pytest.importorskip("timm.utils")
    averaged = utils.ModelEmaV3(model, decay=0.7, **options)
    for _ in range(4):
        step(model)
        averaged.update(model)
    return averaged.module


TOOLS = {
    "torch ema": _torch_ema,
    "torch swa": _torch_swa,
    "timm": _timm,
    "timm without foreach": lambda model, step: _timm(model, step, foreach=False),
}


@BOTH
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    "criterion, value",
    [
        ("confidence", [math.inf, 0.5]),
        ("margin", [[math.inf, 0.25, math.inf], [0.5] * 3]),
        ("entropy", [-math.inf, 0.75]),
        (lambda z: z.amax(1), [math.inf, 0.25]),
    ],
    ids=["confidence", "per class", "entropy", "callable"],
)
def test_an_exit_that_is_off_stays_off(cls, tool, criterion, value):
    def step(model):
        with torch.no_grad():
            for p in model.parameters():
                p += 0.01

    model = elf(cls, thresholds=value, train_thresholds=value, criterion=criterion)
    averaged = TOOLS[tool](model, step)
    twin, saved = copy.deepcopy(averaged), pickle.loads(pickle.dumps(averaged.state_dict()))
    # As it runs, before anything has read the thresholds:
    expected = elf(cls, thresholds=value, train_thresholds=value, criterion=criterion)
    expected.load_state_dict(
        {k: v for k, v in saved.items() if "thresholds" not in k}, strict=False
    )
    for training in (False, True):
        found, wanted = twin.train(training)(X, Y), expected.train(training)(X, Y)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    # As it is read and saved:
    for name in ("thresholds", "train_thresholds"):
        assert getattr(twin, name).tolist() == value
        assert getattr(twin, name) is twin.get_buffer(name)
        assert saved[name].tolist() == value
    assert "nan" not in str(averaged)
    fresh = elf(cls, thresholds=value, train_thresholds=0.5, criterion=criterion)
    fresh.load_state_dict(saved)
    assert fresh.train_thresholds.tolist() == value


@BOTH
def test_a_threshold_averaged_with_an_exit_that_is_off_is_off(cls):
    model = elf(cls, thresholds=[math.inf, 0.5], temperatures=[2.0, 1.0])

    averaged = copy.deepcopy(model)
    model.thresholds[0] = 0.25
    for theirs, other in zip(averaged.buffers(), model.buffers(), strict=True):
        theirs.lerp_(other, 0.5)
    assert averaged.thresholds.tolist() == [math.inf, 0.5]
    assert averaged.temperatures.tolist() == [2.0, 1.0]
    averaged.criterion = "entropy" if averaged.criterion == "confidence" else "confidence"
    assert averaged.thresholds[0] == -math.inf


def test_nan_reads_as_off_under_every_mode():
    model = elf(ELF, thresholds=0.5)
    model.thresholds.fill_(math.nan)
    with torch.inference_mode():
        assert model.eval()(X).exit_index.tolist() == [2] * 9
        assert model.thresholds.tolist() == [math.inf] * 2
        made_there = elf(reference.ELF, thresholds=0.5)
        made_there.thresholds[1] = math.nan
    assert made_there.thresholds.tolist() == [0.5, math.inf]
    assert fuse(made_there).thresholds is made_there.thresholds


@BOTH
def test_functional_call_passes_settings_unchecked(cls):
    model = elf(cls, thresholds=0.0).eval()
    assert model(X).exit_index.tolist() == [0] * 9
    for value in (math.nan, 7.0):  # neither is a threshold that the model itself would take
        out = torch.func.functional_call(model, {"thresholds": torch.full((2,), value)}, (X,))
        assert out.exit_index.tolist() == [2] * 9
    assert model.thresholds.tolist() == [0.0, 0.0]
