"""Networks on long-tailed digits whose exits the comparison of policies reads."""

from __future__ import annotations

from typing import NamedTuple

import torch

from elf_fast import ELF, losses
from elf_fast.backbones import create
from elf_fast.data.digits import Digits, DigitSplits
from elf_fast.demo.loop import Schedule, batches, train
from elf_fast.flops import count_flops
from elf_fast.models import from_backbone
from elf_fast.policy.exit_table import ExitTable, exit_table

from . import trial


class Network(NamedTuple):
    """A network, its loss, and how long-tailed its training data are."""

    model: str
    loss: str
    imbalance: int

    def __str__(self) -> str:
        return f"{self.model.removeprefix('cifar_')}, {self.loss}, {self.imbalance}"


#: The pairs of network and loss, each at one imbalance.
NETWORKS = (
    Network("cifar_resnet8", "cross_entropy", 10),
    Network("cifar_resnet8", "balanced_softmax", 100),
    Network("cifar_resnet14", "cross_entropy", 100),
    Network("cifar_resnet14", "balanced_softmax", 10),
    Network("cifar_resnet20", "cross_entropy", 50),
    Network("cifar_resnet20", "balanced_softmax", 50),
)


#: Modules after which exits go.
EXITS = {
    "cifar_resnet8": ("layer1", "layer2"),
    "cifar_resnet14": ("layer1", "layer2", "layer3.0"),
    "cifar_resnet20": ("layer1", "layer2", "layer3.0"),
}


class Trained(NamedTuple):
    """A trained network, in evaluation mode, and what its exits gave."""

    model: ELF
    validation: ExitTable
    test: ExitTable
    #: [E] FLOPs of a sample that leaves at each exit, as shares of the network without exits.
    costs: list[float]
    class_counts: list[int]
    data: DigitSplits


def trained(network: Network, seed: int, epochs: int) -> Trained:
    data = _coloured(trial.split(network.imbalance, seed))
    loss = {
        "cross_entropy": losses.CrossEntropyLoss(),
        "balanced_softmax": losses.BalancedSoftmaxLoss(data.class_counts),
    }[network.loss]
    torch.manual_seed(seed)
    backbone = create(network.model, num_classes=10)
    model = from_backbone(
        backbone,
        exits=EXITS[network.model],
        num_classes=10,
        conv=True,
        exit_loss=loss,
        train_thresholds=0.9,
        drop_exited=False,
        example_input=data.train.images[:2],
    )
    train(model, data.train, Schedule(epochs=epochs), seed=seed)
    flops = count_flops(model, data.test.images[:1])
    costs = [flops.leaving_at(e) / flops.without_exits for e in range(len(model.stages))]
    tables = [exit_table(model.eval(), batches(part), keep_logits=True)
              for part in (data.validation, data.test)]  # fmt: skip
    return Trained(model, *tables, costs, data.class_counts, data)


def _coloured(data: DigitSplits) -> DigitSplits:
    parts = (data.train, data.validation, data.test)
    three = (Digits(p.images.expand(-1, 3, -1, -1), p.targets, p.position) for p in parts)
    return DigitSplits(*three, class_names=data.class_names)
