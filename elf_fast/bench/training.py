"""Candidates for a training step (forward, loss, backward), run in different ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import unfuse
from .workload import TrainingWork


def candidates(work: TrainingWork) -> dict[str, Callable[[], Any]]:
    """Functions that run one step.

    `elf_fast`: the model; `reference`: the model in plain PyTorch; `full`: the network without
    exits. Each returns its loss and leaves gradients in the parameters, which they share.
    `oracle`: forward and backward of the stages on batches compacted beforehand, without heads,
    exit tests and losses, a lower bound on the time of any training with exits.

    Raises:
        RuntimeError: loss or gradients of elf_fast and of the reference disagree.
    """
    model, images, target, stage_inputs = work
    plain = unfuse(model)
    full = nn.Sequential(*model.stages, model.heads[-1])

    def step(loss: Callable[[], Tensor]) -> Tensor:
        model.zero_grad()
        value = loss()
        value.backward()
        return value.detach()

    inputs = [x.detach().requires_grad_(e > 0) for e, x in enumerate(stage_inputs)]
    with torch.no_grad():
        grads = [torch.ones_like(stage(x)) for stage, x in zip(model.stages, inputs, strict=False)]

    def oracle() -> None:
        model.zero_grad()
        for stage, x, grad in zip(model.stages, inputs, grads, strict=False):
            x.grad = None
            stage(x).backward(grad)

    steps: dict[str, Callable[[], Any]] = {
        "elf_fast": lambda: step(lambda: model(images, target).loss),
        "reference": lambda: step(lambda: plain(images, target).loss),
        "full": lambda: step(lambda: F.cross_entropy(full(images), target)),
        "oracle": oracle,
    }
    _check_agreement(model, steps["elf_fast"], steps["reference"])
    return steps


def _check_agreement(
    model: nn.Module, fast: Callable[[], Tensor], reference: Callable[[], Tensor]
) -> None:
    """Raises RuntimeError if losses or gradients, as vectors, differ by more than 1e-3 of their
    norm. Smaller differences come from float32 sums in another order, through many layers."""
    ours, theirs = ((f(), _gradient(model)) for f in (fast, reference))
    for name, a, b in zip(("loss", "gradient"), ours, theirs, strict=True):
        if not bool((a - b).norm() <= 1e-3 * b.norm()):
            raise RuntimeError(
                f"the {name} of elf_fast and of its reference differ by "
                f"{float((a - b).norm() / b.norm()):.1e} of its norm; "
                "no speed is reported for wrong results"
            )


def _gradient(model: nn.Module) -> Tensor:
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(grads).clone()
