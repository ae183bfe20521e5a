"""Benchmark work: temperatures and thresholds with which a chosen share of the samples goes on.

Temperatures bring the logits of every exit to a standard deviation of 2, because an untrained
network's confidences may differ by less than rounding, or all be 1. A threshold then lies between
the confidences of two samples. Neither changes the cost of an exit.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import criteria
from ..modules import ELF
from ..reference import statistic


class InferenceWork(NamedTuple):
    model: ELF  # in evaluation mode, its thresholds set
    images: Tensor  # [N, ...]
    exit_index: Tensor  # [N] int64
    stage_inputs: list[Tensor]  # the batch that reaches each stage, compacted beforehand


class TrainingWork(NamedTuple):
    model: ELF  # in training mode, its training thresholds set
    images: Tensor  # [N, ...]
    target: Tensor  # [N] int64; for a sample that leaves, the prediction
    stage_inputs: list[Tensor]  # as for inference


def inference_work(model: ELF, images: Tensor, share: float | Sequence[float]) -> InferenceWork:
    """Work with a copy of `model` that lets `share` in [0, 1] of the samples at each exit go on,
    rounded to whole samples. A share of 1 switches the exits off. share: one, or [E-1]."""
    model = copy.deepcopy(model).eval()
    alive = torch.arange(len(images), device=images.device)
    exit_index = torch.full_like(alive, len(model.stages) - 1)
    x, inputs = images, []
    with torch.inference_mode():
        for e, (stage, head) in enumerate(zip(model.stages, model.heads, strict=True)):
            inputs.append(x)
            x = stage(x)
            if e == len(model.stages) - 1:
                break
            goes_on, _ = _decide(model, model.thresholds, e, head(x), _at(share, e))
            exit_index[alive[~goes_on]] = e
            alive = alive[goes_on]
            x = _select(x, goes_on)
            if not len(alive):
                break
    return InferenceWork(model, images, exit_index, inputs)


def training_work(model: ELF, images: Tensor, share: float | Sequence[float]) -> TrainingWork:
    """`inference_work` for a training step. The target of a sample that leaves is the prediction of
    its exit; the other targets are arbitrary classes. The running statistics of BatchNorm are those
    of `model`."""
    model = copy.deepcopy(model).train()
    scratch = copy.deepcopy(model)
    alive = torch.arange(len(images), device=images.device)
    target = torch.zeros_like(alive)
    thresholds = model.train_thresholds if model.train_thresholds is not None else model.thresholds
    x, inputs = images, []
    with torch.no_grad():
        for e, (stage, head) in enumerate(zip(scratch.stages, scratch.heads, strict=True)):
            inputs.append(x)
            x = stage(x)
            if e == len(scratch.stages) - 1:
                break
            logits = head(x) if model.drops_exited else head(x)[alive]
            goes_on, target[alive] = _decide(model, thresholds, e, logits, _at(share, e))
            alive = alive[goes_on]
            if not len(alive):
                break
            if model.drops_exited:
                x = _select(x, goes_on)
    return TrainingWork(model, images, target, inputs)


def _at(share: float | Sequence[float], e: int) -> float:
    return share if isinstance(share, float | int) else share[e]


def going_on(exit_shares: Sequence[float]) -> list[float]:
    """[E-1] the share of those that reach each exit that goes on, from the shares [E] that leave
    there."""
    reaching = [sum(exit_shares[e:]) for e in range(len(exit_shares))]
    return [after / before if before > 0 else 1.0 for before, after in itertools.pairwise(reaching)]


def _decide(
    model: ELF, thresholds: Tensor, e: int, logits: Tensor, share: float
) -> tuple[Tensor, Tensor]:
    """Sets temperature and threshold of exit e. Returns whether each sample goes on, [n] bool, and
    the predictions [n] int64."""
    model.temperatures[e] = logits.std().clamp_min(1e-6) / 2
    criterion = criteria.find(model.criterion)
    value = statistic(logits, model.temperatures[e], criterion)
    ordered = value.sort(descending=not criterion.larger_is_surer).values  # least sure first
    k = round(share * len(value))
    if k >= len(value):
        threshold = torch.tensor(criterion.off, device="cpu")
    elif k == 0:
        everyone = criterion.everyone if criterion.is_bounded else float(ordered[0]) - 1.0
        threshold = torch.tensor(everyone, device="cpu")
    else:
        threshold = (ordered[k - 1].double() + ordered[k].double()) / 2
    thresholds[e] = threshold
    return ~criterion.passes(value, threshold.to(thresholds)), logits.argmax(1)


def _select(x: Tensor, which: Tensor) -> Tensor:
    """The rows `which` of x, in the memory format of x."""
    layout = torch.channels_last if x.dim() == 4 and x.stride(1) == 1 else torch.contiguous_format
    return x[which].contiguous(memory_format=layout)
