"""The demo's network: three residual stages for 16x16 images, with and without exits.

It is here, below the demo, because `loading` opens what the demo wrote.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import ELF, ExitHead

WIDTHS = (32, 64, 96)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut. [N, in, H, W] -> [N, out, H/stride, W/stride]."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def _stages(widths: tuple[int, ...]) -> list[nn.Module]:
    first, second, third = widths
    stem = nn.Sequential(
        nn.Conv2d(1, first // 2, 3, 1, 1, bias=False), nn.BatchNorm2d(first // 2), nn.ReLU()
    )
    return [
        nn.Sequential(stem, Block(first // 2, first, 2), Block(first, first, 1)),
        nn.Sequential(Block(first, second, 2), Block(second, second, 1)),
        nn.Sequential(Block(second, third, 1), Block(third, third, 1)),
    ]


def with_exits(
    num_classes: int, *, widths: tuple[int, ...] = WIDTHS, conv: bool = True, **options: Any
) -> ELF:
    """Three stages, an exit after each; conv as in `ExitHead`, `options` go to `ELF`."""
    heads = [ExitHead(width, num_classes, conv=conv) for width in widths]
    return ELF(_stages(widths), heads, **options)


def without_exits(num_classes: int, *, widths: tuple[int, ...] = WIDTHS, **options: Any) -> ELF:
    """The same stages and last head as an ELF of one stage, so that one training loop can train
    both networks."""
    head = ExitHead(widths[-1], num_classes, conv=True)
    return ELF([nn.Sequential(*_stages(widths))], [head], **options)
