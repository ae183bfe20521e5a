"""The training loop: steps, precision and errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from run_cases import DIGITS, QUIET

from elf_fast.training.processes import Processes
from elf_fast.training.trainer import Trainer


def trainer(**changes) -> Trainer:
    return Trainer(replace(DIGITS, **changes), Processes(torch.device("cpu")), console=QUIET)


def test_without_exits_all_batches_are_the_same():
    def batches(**changes):
        loader = trainer(**changes).loader
        loader.set_epoch(1)
        return list(loader)

    with_exits, without = batches(), batches(exits=())
    assert [len(y) for _, y in with_exits] == [64, 64, 64, 64, 31]
    for (x, y), (x_plain, y_plain) in zip(with_exits, without, strict=True):
        assert torch.equal(x, x_plain) and torch.equal(y, y_plain)


@pytest.mark.parametrize("name", ["cross_entropy", "balanced_softmax"])
def test_deferred_weights_come_at_their_epoch(name, tmp_path, monkeypatch):
    running = trainer(loss=name, drw_epoch=1, output=str(tmp_path), epochs=2)
    used: dict[int, bool] = {}
    step = running.step

    def observed(batches):
        weight = running.model.exit_loss.weight
        used.setdefault(running.progress.epoch, not torch.equal(weight, torch.ones(10)))
        return step(batches)

    monkeypatch.setattr(running, "step", observed)
    running.run()
    assert used == {0: False, 1: True}


NHWC = torch.channels_last


def batch(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, 3, 16, 16, generator=generator),
        torch.randint(0, 10, (n,), generator=generator),
    )


#: A network without batch statistics, whose gradient is a mean over samples.
NO_STATISTICS = {
    "model": "timm/test_nfnet",
    "opt": "momentum",
    "momentum": 0.0,
    "weight_decay": 0.0,
}


def test_accumulated_batches_count_by_their_samples():
    x, y = batch(24)
    whole, parts = (trainer(**NO_STATISTICS) for _ in range(2))
    whole.step([(x, y)])
    parts.step([(x[:16], y[:16]), (x[16:], y[16:])])
    assert parts.progress.totals.loss == pytest.approx(whole.progress.totals.loss, rel=1e-5)
    untouched = trainer(**NO_STATISTICS).model.state_dict()
    moved = 0
    for name, weight in whole.model.named_parameters():
        torch.testing.assert_close(weight, parts.model.get_parameter(name), rtol=1e-4, atol=1e-6)
        moved += not torch.equal(weight, untouched[name])
    assert moved > 10
    assert parts.progress.step == 1 and sum(parts.progress.totals.exits) == 24


def test_a_clipped_step_has_the_length_it_may_have():
    running = trainer(**NO_STATISTICS, clip_grad=1e-3, lr=2.0)
    before = {k: v.detach().clone() for k, v in running.model.named_parameters()}
    running.step([batch(8)])
    moved = [running.model.get_parameter(k).detach() - v for k, v in before.items()]
    length = torch.cat([m.double().flatten() for m in moved]).norm()
    assert float(length) == pytest.approx(2e-3, rel=1e-3)


def test_mixed_precision_memory_format_and_compilation_reach_the_network():
    running = trainer(amp=True, channels_last=True, torchcompile="eager")
    seen = []
    running.model.stages[0].layer1.register_forward_hook(
        lambda module, inputs, out: seen.append((out.dtype, out.is_contiguous(memory_format=NHWC)))
    )
    (images, targets) = next(iter(running.loader))
    assert images.is_contiguous(memory_format=NHWC)
    running.step([(images, targets)])
    assert seen and set(seen) == {(torch.bfloat16, True)}
    assert all(stage._compiled_call_impl is not None for stage in running.model.stages)
    assert running.model.heads[0].classifier.weight.dtype == torch.float32


def test_a_last_batch_of_one_image_is_refused_where_it_cannot_be_normalised():
    N = sum(trainer().class_counts)
    with pytest.raises(
        ValueError, match=f"batch_size: .* more than one of {N} images .* got {N - 1}$"
    ):
        trainer(model="torchvision/resnet18", batch_size=N - 1)
    with pytest.raises(ValueError, match="batch_size: .* got 1$"):
        trainer(model="torchvision/resnet18", batch_size=1)
    trainer(model="torchvision/resnet18", batch_size=N - 2)
    trainer(model="cifar_resnet8", batch_size=N - 1, torchcompile="eager")


def test_synchronised_norms_are_refused_without_gpus(monkeypatch):
    config = replace(DIGITS, sync_bn=True)
    monkeypatch.setattr(Trainer, "_check_same_data", lambda trainer: None)
    with pytest.raises(ValueError, match="sync_bn: expected GPUs, as torch does, got cpu"):
        Trainer(config, Processes(torch.device("cpu"), rank=0, world_size=2), console=QUIET)
