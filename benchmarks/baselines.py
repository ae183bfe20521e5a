"""The baselines of the operators: what a user could run instead. Each takes the tensors that the
function of `elf_fast.functional` takes.

The functions that end in `_without_sync` do not synchronise the host with the device. So a CUDA
graph can hold them, and torch.compile compiles them without a graph break. Like the operators they
pad the survivors to [N], with the value N.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elf_fast import criteria


def plain_gate(logits: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """What most users write. It has no temperature and does not treat NaN or infinite logits."""
    confidence, prediction = torch.softmax(logits, dim=1).max(dim=1)
    return confidence, prediction, (confidence < threshold).nonzero().squeeze(1)


def plain_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy without a gate."""
    return F.cross_entropy(logits, target, reduction="none")


def plain_head(features: Tensor, linear: torch.nn.Linear, threshold: float):
    return plain_gate(linear(features.mean(dim=(2, 3))), threshold)


def read_only(x: Tensor) -> Tensor:
    """The fastest call of PyTorch that reads every element."""
    return x.sum()


def gate_without_sync(
    logits: Tensor, threshold: float, criterion: str = "confidence", target: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """confidence [N], prediction [N], survivors [N]."""
    N, C = logits.shape
    p = torch.softmax(logits, dim=1, dtype=torch.float32)
    confidence, prediction = p.max(dim=1)
    if criterion == "margin":
        best = p.topk(2, dim=1).values
        confidence = best[:, 0] - best[:, 1]
    elif criterion == "entropy":
        confidence = torch.special.entr(p).sum(dim=1) / math.log(C)
    elif criterion != "confidence":
        raise ValueError(f"criterion: expected one that has a baseline, got {criterion!r}")
    leaves = criteria.TABLE[criterion].passes(confidence, threshold)
    if target is not None:
        leaves = leaves & (prediction == target)
    return confidence, prediction, padded_survivors(~leaves)


def padded_survivors(goes_on: Tensor) -> Tensor:
    """[N], from flags [N]: the indices of the rows that go on, ascending, then the value N."""
    N = goes_on.shape[0]
    if not torch.compiler.is_compiling():
        return torch.nonzero_static(goes_on, size=N, fill_value=N).squeeze(1)
    # torch.compile makes one kernel of these lines; nonzero_static would be four.
    place = torch.where(goes_on, goes_on.cumsum(0) - 1, N)
    padded = torch.full((N + 1,), N, device=goes_on.device)
    return padded.scatter(0, place, torch.arange(N, device=goes_on.device))[:N]


def head_without_sync(
    features: Tensor, weight: Tensor, bias: Tensor, threshold: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits [N, C] and the gate's three outputs, of features [N, D, H, W] or [N, T, D]."""
    pooled = features.mean(dim=(2, 3) if features.dim() == 4 else 1)
    logits = F.linear(pooled, weight, bias)
    return logits, *gate_without_sync(logits, threshold)


def loss_without_sync(
    logits: Tensor, target: Tensor, threshold: float, *, weight: Tensor | None = None,
    gamma: float = 0.0, scale: float = 1.0, margins: Tensor | None = None,
    bias: Tensor | None = None, label_smoothing: float = 0.0,
) -> tuple[Tensor, ...]:  # fmt: skip
    """loss [N] and the gate's three outputs; `reference.exit_loss` documents the arguments."""
    gate = gate_without_sync(logits.detach(), threshold, target=target)
    x = logits.float()
    if margins is not None:
        x = x - margins[target, None] * F.one_hot(target, logits.shape[1])
    x = scale * x if bias is None else scale * x + bias
    loss = F.cross_entropy(x, target, reduction="none", label_smoothing=label_smoothing)
    if gamma > 0:
        rest = -torch.expm1(-F.cross_entropy(x, target, reduction="none"))  # 1 - p
        loss = rest.clamp_min(torch.finfo(rest.dtype).tiny) ** gamma * loss
    if weight is not None:
        loss = weight[target] * loss
    return loss, *gate


def forward_and_backward(loss: Any, logits: Tensor, target: Tensor, grad: Tensor):
    """What `loss` returns, with the gradient [N, C] of the logits as the second item. The logits
    must be a leaf."""
    with torch.enable_grad():
        value, *gate = loss(logits, target)
        (grad_logits,) = torch.autograd.grad(value, logits, grad)
    return value.detach(), grad_logits, *gate
