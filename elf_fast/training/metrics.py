"""Accuracy by class frequency, exit shares and FLOPs: every number that the demo prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..modules import ELFOutput
from ..reference import ELF

MANY_ABOVE = 100  # training samples; the usual long-tail groups (Liu et al., arXiv 1904.05160)
FEW_BELOW = 20
GROUPS = ("many", "medium", "few")


def class_groups(class_counts: Sequence[int]) -> dict[str, list[int]]:
    """Classes by training samples: many (> 100), medium (20 to 100) and few (< 20)."""
    groups: dict[str, list[int]] = {name: [] for name in GROUPS}
    for c, n in enumerate(class_counts):
        groups["many" if n > MANY_ABOVE else "few" if n < FEW_BELOW else "medium"].append(c)
    return groups


class Flops(NamedTuple):
    """Floating-point operations for one sample (a multiplication and an addition are two)."""

    stages: tuple[int, ...]  # E
    heads: tuple[int, ...]  # E

    @property
    def without_exits(self) -> int:
        """All stages and the last head: the network without exits."""
        return sum(self.stages) + self.heads[-1]

    def leaving_at(self, e: int) -> int:
        """All that a sample which leaves at exit e (0-based) has passed."""
        return sum(self.stages[: e + 1]) + sum(self.heads[: e + 1])

    def mean(self, exit_index: Tensor) -> float:
        """Per sample, for samples that left at exit_index [N]."""
        cost = torch.tensor([self.leaving_at(e) for e in range(len(self.stages))])
        return cost[exit_index].double().mean().item()


@torch.inference_mode()
def count_flops(model: ELF, sample: Tensor) -> Flops:
    """FLOPs of every stage and head, by torch.utils.flop_counter on one sample [1, ...]."""
    training = model.training
    model.eval()

    def measure(module: nn.Module, x: Tensor) -> tuple[int, Tensor]:
        with FlopCounterMode(display=False) as counter:
            y = module(x)
        return counter.get_total_flops(), y

    stages, heads = [], []
    x = sample
    for stage, head in zip(model.stages, model.heads, strict=True):
        flops, x = measure(stage, x)
        stages.append(flops)
        heads.append(measure(head, x)[0])
    model.train(training)
    return Flops(tuple(stages), tuple(heads))


@torch.inference_mode()
def predict(model: ELF, images: Tensor, batch_size: int = 256) -> ELFOutput:
    """The model's outputs for images [N, ...] in evaluation mode, batch by batch, without loss."""
    training = model.training
    model.eval()
    batches = [model(batch) for batch in images.split(batch_size)]
    model.train(training)
    return ELFOutput(
        logits=torch.cat([b.logits for b in batches]),
        prediction=torch.cat([b.prediction for b in batches]),
        confidence=torch.cat([b.confidence for b in batches]),
        exit_index=torch.cat([b.exit_index for b in batches]),
        loss=None,
    )


def summarise(
    prediction: Tensor,
    exit_index: Tensor,
    targets: Tensor,
    class_counts: Sequence[int],
    flops: Flops,
    flops_without_exits: int,
) -> dict[str, Any]:
    """The metrics of one evaluation, as JSON-able numbers; null where a group has no samples.

    Args:
        prediction, exit_index, targets: [N] int64.
        class_counts: [C] training samples of every class; they define many, medium and few.
        flops: of the model that predicted. flops_without_exits: what its share is taken of.

    Returns:
        overall, many, medium, few: accuracy in [0, 1]. exit_shares [E]; exit_shares_by_class
        [C][E]; exit_accuracy [E]: of the samples that left there. flops_per_sample; flops_share.
    """
    correct = (prediction == targets).double()
    exits = torch.nn.functional.one_hot(exit_index, len(flops.stages)).double()

    def mean(values: Tensor) -> Any:
        return values.mean(0).tolist() if len(values) else None

    accuracy = {"overall": mean(correct)}
    for name, classes in class_groups(class_counts).items():
        accuracy[name] = mean(correct[torch.isin(targets, torch.tensor(classes).long())])
    mean_flops = flops.mean(exit_index)
    return {
        **accuracy,
        "exit_shares": mean(exits),
        "exit_shares_by_class": [mean(exits[targets == c]) for c in range(len(class_counts))],
        "exit_accuracy": [mean(correct[exit_index == e]) for e in range(exits.shape[1])],
        "flops_per_sample": mean_flops,
        "flops_share": mean_flops / flops_without_exits,
    }
