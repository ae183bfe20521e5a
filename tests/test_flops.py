"""Floating-point operations of every stage and head."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from elf_fast import ELF, ExitHead
from elf_fast.flops import Flops, count_flops
from elf_fast.policy.exit_table import exit_table

FLOPS = Flops(stages=(10, 20, 30), heads=(1, 2, 3))


def test_what_a_sample_costs_that_leaves_at_an_exit():
    assert FLOPS.without_exits == 63
    assert [FLOPS.leaving_at(e) for e in range(3)] == [11, 33, 66]
    assert FLOPS.mean([2, 1, 3]) == (2 * 11 + 33 + 3 * 66) / 6


def test_flops_of_a_network_small_enough_to_count():
    model = ELF(
        [nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2)), nn.Conv2d(2, 4, 1)],
        [ExitHead(2, 5), ExitHead(4, 5)],
    ).train()
    model.stages[0][1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    flops = count_flops(model, torch.ones(1, 1, 4, 4))
    assert flops.stages == (2 * 16 * 2 * 9, 2 * 16 * 4 * 2)
    assert flops.heads == (2 * 2 * 5, 2 * 4 * 5)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for several in (torch.ones(2, 1, 4, 4), torch.ones(0, 1, 4, 4), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"^sample: expected one sample \[1, ...\], got a"):
            count_flops(model, several)


def test_a_batch_norm_without_running_statistics():
    norm = nn.BatchNorm1d(6, track_running_stats=False)
    stages = [nn.Linear(5, 6), nn.Sequential(norm, nn.Linear(6, 4))]
    model = ELF(stages, [ExitHead(6, 3), ExitHead(4, 3)])
    assert count_flops(model, torch.randn(1, 5)) == Flops((60, 48), (36, 24))


class Cached(nn.Linear):
    """Makes a constant in its first forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "constant"):
            self.constant = torch.ones(6)
        return super().forward(x) * self.constant


@pytest.mark.parametrize(
    "look",
    [
        lambda model, x: count_flops(model, x),
        lambda model, x: exit_table(model, [(x, torch.zeros(1).long())]),
    ],
    ids=["count_flops", "exit_table"],
)
def test_the_input_stays_and_the_model_can_train(look):
    second = nn.Sequential(nn.ReLU(inplace=True), Cached(6, 6))
    model = ELF([nn.Flatten(), second], [ExitHead(6, 3), ExitHead(6, 3)], thresholds=1.0)
    x = torch.randn(1, 6)
    before = x.clone()
    look(model, x)
    assert torch.equal(x, before)
    model.train()(torch.randn(4, 6), torch.zeros(4).long()).loss.backward()
