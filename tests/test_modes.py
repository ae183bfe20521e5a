"""Training and evaluation mode for a block."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from elf_fast import ELF, ExitHead, from_backbone
from elf_fast.flops import count_flops
from elf_fast.modes import mode
from elf_fast.policy.exit_table import exit_table

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Biased(nn.Linear):
    """Keeps what it computes from its weights until it trains again, as timm's LeViT does."""

    kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.kept is None:
            self.kept = self.weight.detach() * 2
        return nn.functional.linear(x, self.kept, self.bias)

    def train(self, mode: bool = True) -> Biased:
        if mode:
            self.kept = None
        return super().train(mode)


class Frozen(nn.Sequential):
    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("only", [lambda module: True, lambda module: isinstance(module, Frozen)])
def test_every_module_has_its_own_mode_again_whatever_train_does(training, only):
    net = nn.Sequential(Frozen(nn.Dropout(), nn.Sequential(nn.Dropout())), nn.Dropout())
    net[0][1].training = net.training = False
    before = {module: module.training for module in net.modules()}
    with mode(net, training=training, only=only):
        for module, flag in before.items():
            assert module.training == (training if only(module) else flag)
    assert {module: module.training for module in net.modules()} == before


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "look",
    [
        lambda model: count_flops(model, X[:1]),
        lambda model: exit_table(model, [(X, torch.zeros(4).long())]),
        lambda model: from_backbone(
            nn.Sequential(*model.stages, model.heads[1]), ["0"], 3, example_input=X
        ),
    ],
    ids=["count_flops", "exit_table", "from_backbone"],
)
def test_nothing_computed_from_old_weights_is_kept(look, training):
    stages = [nn.Linear(6, 6), Biased(6, 6)]
    model = ELF(stages, [ExitHead(6, 3), nn.Linear(6, 3)], thresholds=math.inf).train(training)
    for factor in (1.0, 0.5):
        with torch.no_grad():
            stages[1].weight.mul_(factor)
        look(model)
    assert stages[1].kept is None


class Program(nn.Module):
    """As an exported program, it has one mode."""

    def train(self, mode: bool = True) -> Program:
        raise NotImplementedError


class Fails(nn.Module):
    def train(self, mode: bool = True) -> Fails:
        if mode:
            raise RuntimeError("train fails")
        return super().train(mode)


def test_a_train_that_fails_leaves_no_other_mode():
    with mode(Program(), training=False):
        pass
    net = nn.Sequential(nn.Dropout(), Fails())
    with pytest.raises(RuntimeError, match="train fails"), mode(net, training=False):
        pass
    assert all(module.training for module in net.modules())
