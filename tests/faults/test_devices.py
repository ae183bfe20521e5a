"""Tensors of two devices in one call, and another default device of torch: results are those of the
usual default device, or an error; a fake never stands in for a result."""

from __future__ import annotations

import contextlib
import copy
import math

import pytest
import torch
from torch import nn

from elf_fast import ELF, ExitHead, arguments, criteria, flops, losses, ops, reference, samplers
from elf_fast.policy import one_number
from elf_fast.policy.exit_table import exit_table

BOTH = pytest.mark.parametrize("cls", [reference.ELF, ELF], ids=["reference", "elf_fast"])
Z, Y = (
    torch.randn(6, 4, generator=torch.Generator().manual_seed(1)),
    torch.tensor([0, 3, 1, 2, 2, 0]),
)
T, ONE, VECTOR = torch.tensor(0.45), torch.tensor(1.0), torch.linspace(0.5, 1.0, 4)
SURVIVORS = torch.tensor([1, 4])
SURVIVORS6 = torch.arange(6)
OUTPUTS = (
    torch.zeros(6, 4), torch.zeros(6), *(torch.zeros(6, dtype=torch.int64) for _ in range(4)),
    torch.tensor(0),
)  # fmt: skip
CALLS = {
    "exit_gate": (Z, T, ONE, 0, Y, False),
    "exit_head": (Z, torch.randn(3, 4), torch.randn(3), T, ONE, 0, Y % 3, False, True),
    "exit_gate_into": (Z, T, ONE, 0, False, 1, SURVIVORS6, *OUTPUTS),
    "exit_head_into": (Z, torch.randn(4, 4), None, T, ONE, 0, False, 1, SURVIVORS6, *OUTPUTS),
    "compact": (Z, SURVIVORS),
    "compact_into": (torch.zeros(6, 4), Z, SURVIVORS, torch.tensor(2)),
    "compact_": (Z, SURVIVORS, torch.tensor(2)),
    "compact_backward": (Z[:2], SURVIVORS, 6),
    "exit_loss": (Z, Y, VECTOR, VECTOR, VECTOR, 1.0, 2.0, 0.1, T, ONE, 0),
    "exit_loss_backward": (torch.rand(6), Z, Y, torch.rand(6), VECTOR, None, None, 0.0, 1.0, 0.0),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_operator_refuses_each_tensor_on_the_meta_device_beside_real_ones(name):
    op, args = getattr(ops, name), CALLS[name]
    for i, (argument, value) in enumerate(zip(op._schema.arguments, args, strict=True)):
        if isinstance(value, torch.Tensor):
            mixed = [*args]
            mixed[i] = value.to("meta")
            message = ": expected device " if i == 0 else f"{argument.name}: expected device cpu"
            with pytest.raises(ValueError, match=message):
                op(*mixed)
    op(*(a.to("meta") if isinstance(a, torch.Tensor) and a.dim() else a for a in args))  # traces


@contextlib.contextmanager
def _set_default(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


DEFAULTS = pytest.mark.parametrize(
    "elsewhere", [_set_default, torch.device], ids=["set_default_device", "with torch.device"]
)


def elf(cls, **options):
    torch.manual_seed(0)
    heads = [ExitHead(4, 4), nn.Linear(4, 4), ExitHead(4, 4)]
    return cls([nn.Linear(4, 4) for _ in heads], heads, **options)


@DEFAULTS
@BOTH
@pytest.mark.parametrize("criterion", ["confidence", "entropy", lambda z: z.amax(1)])
@pytest.mark.parametrize("drop_exited", [True, False])
def test_a_network_computes_the_same_under_another_default_device(
    elsewhere, cls, criterion, drop_exited
):
    model = elf(cls, criterion=criterion, drop_exited=drop_exited)
    model.thresholds = {"confidence": 0.4, "entropy": 0.95}.get(criterion, 0.5)
    twin = copy.deepcopy(model)
    expected = model.eval()(Z), model.train()(Z, Y), model(Z[:0], Y[:0])
    assert len(expected[0].exit_index.unique()) > 1
    expected[1].loss.backward()
    arguments._cpu_scalars.cache_clear()
    with elsewhere("meta"):
        found = twin.eval()(Z), twin.train()(Z, Y), twin(Z[:0], Y[:0])
        found[1].loss.backward()
        assert str(twin) == str(model)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    gradients = [[p.grad for p in m.parameters()] for m in (twin, model)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@DEFAULTS
def test_numbers_of_the_users_keep_their_values_under_another_default_device(elsewhere):
    metrics = pytest.importorskip("elf_fast.metrics")
    model = elf(ELF, thresholds=0.4).eval()
    cost, counts = flops.count_flops(model, Z[:1]), [9, 6, 3, 1]
    tensors = torch.tensor(counts), torch.tensor([0.3, 0.6])

    def everything():
        measured = metrics.ELFMetrics(counts, cost, temperatures=[1.0, 2.0, 1.5])
        measured.update(model(Z), Y)
        table = exit_table(model, [(Z, Y)])
        other = elf(ELF, thresholds=tensors[1], temperatures=2)
        one_number.set_threshold(other, 0.5)
        loss = losses.DeferredReweighting(losses.LDAMLoss(counts), counts, start_epoch=1)
        return [
            loss.margins, loss._after, losses.BalancedSoftmaxLoss(tensors[0]).bias,
            other.thresholds, other.temperatures, measured.compute(), table[:3],
            one_number.sweep(table, cost), criteria.find(lambda z: z).candidates(Z),
            [*samplers.InstanceSampler(Y, seed=4)], [*samplers.ProgressiveSampler([0, 1, 1], 5)],
        ]  # fmt: skip

    expected = everything()
    with elsewhere("meta"):
        found = everything()
    assert str(found) == str(expected)


@BOTH
def test_settings_on_the_meta_device_never_decide_about_real_samples(cls):
    nowhere = torch.tensor([0.5, 0.5], device="meta")
    model = elf(cls, thresholds=nowhere).eval()
    with pytest.raises((ValueError, RuntimeError), match="meta"):
        model(Z)
    model = elf(cls)
    for name in ("thresholds", "train_thresholds", "temperatures"):
        with pytest.raises(ValueError, match=f"{name}: expected values, got .* meta device"):
            setattr(model, name, nowhere)
    with pytest.raises(ValueError, match="class_counts: expected values, got .* meta device"):
        losses.log_prior(nowhere)


def test_the_last_exit_keeps_its_sample_under_any_mode():
    """Its settings are made once; neither a mode nor autograd may find another mode's tensor."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = elf(ELF, thresholds=math.inf)
    with FakeTensorMode() as mode, contextlib.suppress(Exception):
        copy.deepcopy(model).eval()(mode.from_tensor(Z))
    with torch.inference_mode():
        model.eval()(Z)
    out = model(Z)
    out.confidence.sum()
    out.logits.sum().backward()
    assert out.exit_index.tolist() == [2] * 6


def test_replicas_of_data_parallel_keep_settings_on_their_own_devices():
    model = ELF([nn.Linear(4, 4), nn.Linear(4, 4)], [nn.Linear(4, 3), nn.Linear(4, 3)])
    replica = model._replicate_for_data_parallel()
    there = torch.tensor([0.5], device="meta")
    replica.thresholds = there
    assert replica.thresholds is there
    assert model.thresholds.device.type == "cpu"
