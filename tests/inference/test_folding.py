"""BatchNorm folded into convolutions."""

from __future__ import annotations

import pytest
import timm
import torch
from inference.networks import Block, maps, used
from torch import nn

from elf_fast.inference import code, folding, parts


def norms(network: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "regnetx_002"])
def test_networks_of_timm_lose_every_batch_norm(name):
    torch.manual_seed(0)
    network = used(timm.create_model(name, num_classes=4)).eval()
    x = torch.randn(2, 3, 64, 64)
    folded = folding.fold(network, x)
    assert norms(network) > 10 and norms(folded) == 0
    with torch.no_grad():
        torch.testing.assert_close(folded(x), network(x), rtol=1e-3, atol=1e-4)


class Shared(nn.Module):
    """One convolution that two norms read, and one that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.twice = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.a, self.b, self.c = (nn.BatchNorm2d(8) for _ in range(3))

    def forward(self, x):
        y = self.conv(x)
        return self.c(self.twice(self.twice(self.a(y) * self.b(y))))


class AlsoRead(nn.Module):
    """What the norm reads is read elsewhere, too: folding gives other results."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


@pytest.mark.parametrize("kind", [Shared, AlsoRead])
def test_code_gives_the_results_of_the_model_where_folding_is_wrong(kind):
    torch.manual_seed(0)
    part = parts.Part(used(kind()).eval(), nn.Identity(), is_last=True)
    x = torch.randn(3, 8, 4, 4)
    with torch.no_grad():
        example = parts.Example(x, part(x))
        made = code.eager(part, example)
        torch.testing.assert_close(made.run(x), part(x))


def test_hooks_are_kept():
    model, x = maps()
    seen = []
    block = next(m for m in model.modules() if isinstance(m, Block))
    block.norm.register_forward_hook(lambda *args: seen.append(1))
    folded = folding.fold(model.stages[0], x)
    assert norms(folded) == 1
    seen.clear()
    folded(x)
    assert seen == [1]
