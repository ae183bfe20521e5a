"""An exit's classifier against its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from elf_fast import ExitHead
from elf_fast.heads import pool


@pytest.mark.parametrize("shape", [(3, 6), (3, 4, 6), (3, 6, 2, 5)], ids=str)
def test_logits_are_those_of_the_mean_over_positions(shape):
    head, x = ExitHead(6, 5), torch.randn(shape)
    rows = {2: lambda x: x, 3: lambda x: x.sum(1) / 4, 4: lambda x: x.sum((2, 3)) / 10}
    mean = rows[x.dim()](x)
    torch.testing.assert_close(pool(x), mean)
    expected = mean @ head.classifier.weight.T + head.classifier.bias
    torch.testing.assert_close(head(x), expected)


def test_a_convolution_halves_the_map_and_is_normalised_and_rectified():
    head, x = ExitHead(6, 5, conv=True).eval(), torch.randn(3, 6, 7, 8)
    conv, norm, _ = head.stem
    with torch.no_grad():
        norm.running_mean.normal_(), norm.weight.normal_()
    z = F.conv2d(x, conv.weight, stride=2, padding=1)
    assert z.shape == (3, 6, 4, 4)
    z = (z - norm.running_mean[:, None, None]) / (1 + norm.eps) ** 0.5
    z = (z * norm.weight[:, None, None]).relu().mean((2, 3))
    torch.testing.assert_close(head(x), head.classifier(z))
