"""Models on the meta device, and batches of 2**40 rows that take no memory."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from elf_fast import ELF, ExitHead, backend, functional, losses, ops, reference

BOTH = pytest.mark.parametrize("cls", [reference.ELF, ELF], ids=["reference", "elf_fast"])
ROWS = 2**40
SURVIVORS = torch.tensor([1, 5, ROWS - 1])


def elf(cls, **options):
    torch.manual_seed(0)
    stages = [nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)]
    return cls(stages, [ExitHead(6, 5) for _ in stages], **options)


SETTINGS = {"thresholds": [0.4, math.inf], "train_thresholds": 0.6, "temperatures": [2.0, 0.5]}


@BOTH
@pytest.mark.parametrize("how", ["made there", "moved there"])
def test_a_model_on_the_meta_device_is_printed_copied_and_saved(cls, how):
    with torch.device("meta" if how == "made there" else "cpu"):
        model = elf(cls, **SETTINGS)
    model = model.to("meta")
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert "thresholds=[2] on the meta device" in repr(twin)
        assert {t.device.type for t in twin.state_dict().values()} == {"meta"}


@BOTH
@pytest.mark.parametrize("assign", [True, False])
def test_a_model_made_on_the_meta_device_is_filled_by_a_file(cls, assign):
    source = elf(cls, **{**SETTINGS, "thresholds": torch.rand(2, 5)}).eval()
    x = torch.randn(7, 3, 4, 4)
    with torch.device("meta"):
        made = elf(cls, train_thresholds=0.1)
    if not assign:
        made = made.to_empty(device="cpu")
    made.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign)
    torch.testing.assert_close(made.eval()(x), source(x), rtol=0, atol=0)


@BOTH
def test_settings_outlive_to_empty(cls):
    """Weights do not: initialise or load them."""
    with torch.device("meta"):
        model = nn.Sequential(elf(cls, **SETTINGS))
    model.to_empty(device="cpu")
    assert model[0].thresholds.tolist() == [0.4000000059604645, math.inf]
    assert model[0].train_thresholds.tolist() == [0.6000000238418579] * 2
    assert model[0].temperatures.tolist() == [2.0, 0.5]
    waiting = elf(cls).to("meta")
    waiting.thresholds = 0.25  # a number waits on the CPU
    assert waiting.to_empty(device="cpu").thresholds.tolist() == [0.25, 0.25]


def test_losses_made_under_the_meta_device_hold_values():
    with torch.device("meta"):
        loss = losses.DeferredReweighting(losses.LDAMLoss([4, 2, 1]), [4, 2, 1], start_epoch=0)
        assert "scale=30.0" in repr(loss)
    expected = losses.DeferredReweighting(losses.LDAMLoss([4, 2, 1]), [4, 2, 1], start_epoch=0)
    z, y = torch.randn(3, 3), torch.tensor([0, 2, 1])
    assert torch.equal(loss(z, y), expected(z, y))


@pytest.fixture(params=["torch", "cpu", "triton"])
def served(request):
    """Every backend of the CPU that needs no compiler; tests/test_ops.py has the others."""
    if backend._why_not(request.param) is not None:
        pytest.skip(f"no backend {request.param} here")
    with backend.use_backend(request.param):
        yield


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off")
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0, 2), (2, 3, 0)], ids=str)
def test_compaction_of_rows_without_bytes(shape, served):
    x = torch.empty(ROWS, *shape)
    assert functional.compact(x, SURVIVORS).shape == (3, *shape)
    assert functional.compact_(x, SURVIVORS).tolist() == [5, 1, ROWS - 1]
    leaf = torch.empty(ROWS, *shape, requires_grad=True)
    functional.compact(leaf, SURVIVORS).sum().backward()
    assert leaf.grad.shape == leaf.shape
    ops.compact_into(x[:3].clone(), x, SURVIVORS, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off")
def test_rows_that_share_their_memory_are_found(served):
    x = torch.arange(6.0)[None].expand(ROWS, 6)
    assert functional.compact(x, SURVIVORS).tolist() == [[*range(6)]] * 3


def test_shapes_of_2_to_the_40_rows_are_traced():
    z = torch.empty(ROWS, 5, device="meta")
    one, y = torch.tensor(1.0), torch.empty(ROWS, dtype=torch.int64, device="meta")
    features = torch.empty(ROWS, 4, 7, 7, device="meta").to(memory_format=torch.channels_last)
    head = torch.empty(5, 4, device="meta")
    outs = [
        *ops.exit_gate(z, one, one, 0, y, True)[:3],
        *ops.exit_head(features, head, None, one, one, 0, None, False, True)[:5],
        *ops.exit_loss(z, y, None, None, None, 0.0, 1.0, 0.0, one, one, 0)[:5],
        ops.compact_backward(features[:3], SURVIVORS.to("meta"), ROWS),
        ops.compact(features, y),
    ]
    assert all(out.is_meta and len(out) == ROWS for out in outs)
