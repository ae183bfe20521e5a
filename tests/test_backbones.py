"""Networks by name, and their default exits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from elf_fast import backbones, from_backbone


def test_cifar_resnet_is_the_papers():
    """He et al., arXiv 1512.03385, table 6: 0.27 M to 1.7 M parameters."""
    for depth, millions in ((20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)):
        net = backbones.CifarResNet(depth)
        assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, rel=0.03)
        layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert len(layers) == depth
    assert backbones.create("cifar_resnet20", 7)(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    with pytest.raises(ValueError, match="depth: expected 6n \\+ 2 .*, got 33"):
        backbones.create("cifar_resnet33", 10)


def test_option_a_shortcut_keeps_every_other_pixel_and_pads_channels():
    block = backbones._Block(2, 4, 2).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(1, 2, 4, 4)
    expected = torch.zeros(1, 4, 2, 2)
    expected[:, 1:3] = x[:, :, ::2, ::2]
    assert torch.equal(block(x), expected)


@pytest.mark.parametrize(
    "name, exits",
    [
        ("cifar_resnet32", ["layer1", "layer2"]),
        ("torchvision/resnet18", ["layer1", "layer2", "layer3"]),
        ("torchvision/mobilenet_v3_small", ["features.2", "features.5", "features.8"]),
        ("timm/convnext_atto", ["stages.0", "stages.1", "stages.2"]),
        ("timm/vit_tiny_patch16_224", ["blocks.2", "blocks.5", "blocks.8"]),
        ("timm/regnetx_002", ["s1", "s2", "s3"]),
        ("timm/legacy_seresnet18", ["layer1", "layer2", "layer3"]),
        ("timm/dla34", ["level1", "level2", "level3"]),
    ],
)
def test_default_exits_fit(name, exits):
    pytest.importorskip(name.partition("/")[0] if "/" in name else "torch")
    net = backbones.create(name, 10)
    assert backbones.default_exits(net) == exits
    x = torch.randn(1, 3, 224 if "vit" in name else 32, 224 if "vit" in name else 32)
    assert len(from_backbone(net, exits, 10, example_input=x).heads) == len(exits) + 1


def test_unknown_names_are_refused():
    pytest.importorskip("timm")
    with pytest.raises(
        ValueError, match="name: expected .*, got 'resnet_18'; near names: .*resnet18"
    ):
        backbones.create("resnet_18", 10)
    with pytest.raises(ValueError, match="exits: Linear has no layer1"):
        backbones.default_exits(nn.Linear(2, 2))
