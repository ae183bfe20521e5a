"""What a user could run instead of an operator; each takes the same tensors as `functional`'s."""

from __future__ import annotations

import torch
from torch import Tensor


def plain_gate(logits: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """The four calls that people write: no NaN, infinite logits or temperature."""
    confidence, prediction = torch.softmax(logits, dim=1).max(dim=1)
    return confidence, prediction, (confidence < threshold).nonzero().squeeze(1)


def plain_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy alone, without a gate."""
    return torch.nn.functional.cross_entropy(logits, target, reduction="none")


def plain_head(features: Tensor, linear: torch.nn.Linear, threshold: float):
    return plain_gate(linear(features.mean(dim=(2, 3))), threshold)


def read_only(x: Tensor) -> Tensor:
    """The cheapest pass that PyTorch has over a buffer."""
    return x.sum()
