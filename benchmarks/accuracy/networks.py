"""Networks on long-tailed digits whose exits the comparison of policies reads."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from elf_fast import losses
from elf_fast.backbones import create
from elf_fast.data.digits import Digits, DigitSplits
from elf_fast.demo.loop import Schedule, batches, train
from elf_fast.flops import count_flops
from elf_fast.models import from_backbone
from elf_fast.policy.costs import flops_shares
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


class Tables(NamedTuple):
    """What the exits of a trained network gave."""

    validation: ExitTable
    test: ExitTable
    #: [E] FLOPs of a sample that leaves at each exit, as shares of the network without exits.
    costs: list[float]


def tables(network: Network, seed: int, epochs: int, work: Path | None = None) -> Tables:
    """Trains a network. With `work` its tables are kept in that folder, and read if they are there:
    delete the folder after a change of the training."""
    kept = None if work is None else work / f"{network}, seed {seed}, {epochs} epochs.pt"
    if kept is not None and kept.exists():
        held = torch.load(kept, weights_only=True)
        parts = (ExitTable.from_logits(*held[name]) for name in ("validation", "test"))
        return Tables(*parts, held["costs"])
    found = _trained(network, seed, epochs)
    if kept is not None:
        held = {name: (getattr(found, name).logits.contiguous(), getattr(found, name).target)
                for name in ("validation", "test")}  # fmt: skip
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save({**held, "costs": found.costs}, kept)
    return found


def _trained(network: Network, seed: int, epochs: int) -> Tables:
    data = _coloured(trial.split(network.imbalance, seed))
    loss = {
        "cross_entropy": losses.CrossEntropyLoss(),
        "balanced_softmax": losses.BalancedSoftmaxLoss(data.class_counts),
    }[network.loss]
    torch.manual_seed(seed)
    model = from_backbone(
        create(network.model, num_classes=10),
        exits=EXITS[network.model],
        num_classes=10,
        conv=True,
        exit_loss=loss,
        train_thresholds=0.9,
        drop_exited=False,
        example_input=data.train.images[:2],
    )
    train(model, data.train, Schedule(epochs=epochs), seed=seed)
    costs = flops_shares(count_flops(model, data.test.images[:1]))
    parts = [exit_table(model.eval(), batches(part), keep_logits=True)
             for part in (data.validation, data.test)]  # fmt: skip
    return Tables(*parts, costs)


def _coloured(data: DigitSplits) -> DigitSplits:
    parts = (data.train, data.validation, data.test)
    three = (Digits(p.images.expand(-1, 3, -1, -1), p.targets, p.position) for p in parts)
    return DigitSplits(*three, class_names=data.class_names)
