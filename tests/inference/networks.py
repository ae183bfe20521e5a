"""Small networks with exits, and what an engine of one must give."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import elf_fast
from elf_fast.bench.workload import inference_work

C = 5


class Block(nn.Module):
    """Convolution, BatchNorm and a residual that the BatchNorm does not see, in place."""

    def __init__(self, D: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(D, D, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(D)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return self.act(y + x) if y.shape == x.shape else self.act(y)


def used(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network with BatchNorm statistics and weights as after training."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for t in (module.running_mean, module.bias.data):
                t.copy_(torch.randn(t.shape, generator=generator) * 0.3)
            for t in (module.running_var, module.weight.data):
                t.copy_(torch.rand(t.shape, generator=generator) + 0.5)
    return network


def half_leave(model: elf_fast.ELF, x: Tensor) -> tuple[elf_fast.ELF, Tensor]:
    """(a copy of the model with which half of x leave at every exit, x)."""
    return inference_work(model, x, 0.5).model, x


def maps() -> tuple[elf_fast.ELF, Tensor]:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), Block(8))
    stages = [used(stem), used(nn.Sequential(Block(8), Block(8, 2)), 1)]
    heads = [used(elf_fast.ExitHead(8, C, conv=True), 2), elf_fast.ExitHead(8, C)]
    return half_leave(elf_fast.ELF(stages, heads), torch.randn(64, 3, 12, 12))


def tokens() -> tuple[elf_fast.ELF, Tensor]:
    torch.manual_seed(0)
    layer = dict(nhead=2, dim_feedforward=16, dropout=0.0, batch_first=True)
    stages = [nn.TransformerEncoderLayer(8, **layer) for _ in range(2)]
    heads = [elf_fast.ExitHead(8, C), elf_fast.ExitHead(8, C)]
    return half_leave(elf_fast.ELF(stages, heads), torch.randn(64, 6, 8))


def vectors() -> tuple[elf_fast.ELF, Tensor]:
    torch.manual_seed(0)
    own_head = nn.Sequential(nn.Tanh(), nn.Linear(8, C))
    stages = [nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 8), nn.Linear(8, C)]
    heads = [nn.Linear(8, C), own_head, nn.Identity()]
    return half_leave(elf_fast.ELF(stages, heads), torch.randn(64, 4))


def deep(exits: int) -> tuple[elf_fast.ELF, Tensor]:
    """Many exits."""
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(exits)]
    model = elf_fast.ELF(stages, [elf_fast.ExitHead(8, C) for _ in stages])
    return half_leave(model, torch.randn(64, 8))


NETWORKS = {"maps": maps, "tokens": tokens, "vectors": vectors}


def assert_equal(found: elf_fast.ELFOutput, model: elf_fast.ELF, x: Tensor) -> None:
    """The engine's output equals the model's: everything but rounding; exits where the confidence
    is no tie. All samples count that are not within 1e-4 of a threshold at some exit."""
    with torch.no_grad():
        expected = model(x)
    far = torch.ones(len(x), dtype=torch.bool)
    criterion = elf_fast.criteria.find(model.criterion)
    y = x
    with torch.no_grad():
        for e, (stage, head) in enumerate(zip(model.stages[:-1], model.heads, strict=False)):
            y = stage(y)
            z = head(y)
            value = elf_fast.reference.statistic(z, model.temperatures[e], criterion)
            t = model.thresholds[e]
            t = t[z.argmax(1)] if t.dim() else t
            far &= ~((value - t).abs() <= 1e-4)
    assert not len(x) or far.float().mean() > (0.9 if len(x) > 20 else 0.0)
    for name in ("prediction", "exit_index"):
        assert torch.equal(getattr(found, name)[far], getattr(expected, name)[far]), name
    torch.testing.assert_close(
        found.logits[far], expected.logits[far], rtol=1e-4, atol=1e-4, equal_nan=True
    )
    torch.testing.assert_close(
        found.confidence[far], expected.confidence[far], rtol=1e-4, atol=1e-4, equal_nan=True
    )
    assert [t.dtype for t in found[:4]] == [t.dtype for t in expected[:4]]
    assert [t.shape for t in found[:4]] == [t.shape for t in expected[:4]]
    assert found.loss is None
