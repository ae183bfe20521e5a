"""One run on digits: trains a network, chooses thresholds on validation and tests it once."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from elf_fast import ELF, ExitHead, losses
from elf_fast.classifiers import adjust_logits_, use_cosine_
from elf_fast.data import long_tailed_digits
from elf_fast.data.digits import DigitSplits
from elf_fast.demo.loop import EpochStats, Schedule, batches, predict, train
from elf_fast.flops import Flops, count_flops
from elf_fast.metrics import ELFMetrics
from elf_fast.policy import one_number
from elf_fast.policy.exit_table import exit_table
from elf_fast.policy.one_number import OperatingPoint
from elf_fast.runs import demo_network as network

from ..environment import environment
from .runs import CONVOLUTIONS, VARIANTS, Exits, Run

SCHEDULE = Schedule(epochs=80)
#: Share of the FLOPs of the network without exits that ELF may use by its own claim.
FLOPS_LIMIT = 0.8
#: DRW re-weights in the last fifth, as Cao et al. (arXiv 1906.07413, section 4: 160 of 200 epochs).
REWEIGHTED_FROM = 0.8
#: What a record keeps of the metrics; the test part is balanced, so macro accuracy is the overall.
KEPT = (
    "overall",
    "many",
    "medium",
    "few",
    "ece",
    "exit_accuracy",
    "exit_shares",
    "exit_shares_by_group",
    "early_wrong",
    "early_wrong_by_group",
    "flops_share",
)


def split(imbalance: float, seed: int) -> DigitSplits:
    """The data of a seed: its own training, validation and test digits, and its own order of the
    digits from head to tail."""
    order = torch.randperm(10, generator=torch.Generator().manual_seed(seed)).tolist()
    return long_tailed_digits(imbalance, seed=seed, class_order=order)


def build(run: Run, class_counts: Sequence[int], epochs: int) -> ELF:
    """The untrained network of a run; in evaluation no sample leaves early. A network without exits
    is made of the stages and the last head of the one with exits, so that their weights are
    equal."""
    C = len(class_counts)
    loss = _exit_loss(run.loss, class_counts, epochs)
    exits = VARIANTS[run.variant]
    options: dict[str, Any] = {}
    if exits is not None:
        options = {
            "train_thresholds": _train_thresholds(exits, loss, C, epoch=0, epochs=epochs),
            "exit_weights": exits.weights,
            "drop_exited": exits.drop_exited,
        }
    torch.manual_seed(run.seed)
    elf = network.with_exits(
        C,
        conv=CONVOLUTIONS[run.head] > 0,
        exit_loss=loss,
        thresholds=math.inf,
        temperatures=_temperature(loss, exits),
        **options,
    )
    if run.loss == "ldam_drw":
        use_cosine_(elf)
    for head in elf.heads:
        _deepen(head, CONVOLUTIONS[run.head])
    if exits is None:
        return ELF([nn.Sequential(*elf.stages)], [elf.heads[-1]], exit_loss=loss)
    _freeze_on_small_batches(elf, exits.rests_below)
    return elf


def _temperature(loss: losses.LongTailLoss, exits: Exits | None) -> float:
    """The temperature of the exit test. With cosines the loss has a scale, see CosineClassifier."""
    return (1.0 if exits is None else exits.softened) / loss.scale


def _train_thresholds(
    exits: Exits, loss: losses.LongTailLoss, classes: int, *, epoch: int, epochs: int
) -> Tensor:
    """The thresholds [E-1, C] of the exit test in training, at an epoch that counts from 0."""
    if epoch < exits.opened * epochs:
        return torch.full((2, classes), math.inf)
    if exits.margins and loss.margins is not None:
        return loss.margin_thresholds(exits.threshold).expand(2, classes)
    return torch.full((2, classes), exits.threshold)


def _deepen(head: ExitHead, depth: int) -> None:
    """Adds convolutions to a head with one until it has `depth`."""
    D = head.classifier.in_features
    for _ in range(1, depth):
        head.stem.extend([nn.Conv2d(D, D, 3, padding=1, bias=False), nn.BatchNorm2d(D), nn.ReLU()])


def _freeze_on_small_batches(model: nn.Module, below: int) -> None:
    """Makes BatchNorm use its running statistics, and not update them, on batches of fewer than
    `below` samples."""

    def before(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        norm.asked = norm.training
        norm.training = norm.training and len(inputs[0]) >= below

    def after(norm: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        norm.training = norm.asked

    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d) and below:
            norm.register_forward_pre_hook(before)
            norm.register_forward_hook(after)


def _exit_loss(name: str, class_counts: Sequence[int], epochs: int) -> losses.LongTailLoss:
    if name == "balanced_softmax":
        return losses.BalancedSoftmaxLoss(class_counts)
    if name == "ldam_drw":
        start = round(REWEIGHTED_FROM * epochs)
        ldam = losses.LDAMLoss(class_counts)
        return losses.DeferredReweighting(ldam, class_counts, start_epoch=start)
    # Logit adjustment is post hoc here: in the loss, with tau = 1, it is balanced softmax.
    return losses.CrossEntropyLoss()


def perform(run: Run, schedule: Schedule = SCHEDULE) -> dict[str, Any]:
    """Trains a network and tests it.

    Returns: the record, a dict that JSON can hold. On one machine it is the same every time, except
    for "seconds" and "environment", which has the number of threads.

    Accuracies are shares in [0, 1], floats have 6 decimals. A threshold is None where no sample
    leaves early, an accuracy where the group is empty. "validation" and "test" have an entry for
    each operating point. "full" runs all samples to the last exit. With exits there are two more:
    "safe", the cheapest threshold that loses no validation accuracy against "full"; and "best", the
    most accurate threshold on validation within FLOPS_LIMIT (of equally accurate ones the highest).
    """
    start = time.perf_counter()
    data = split(run.imbalance, run.seed)
    model = build(run, data.class_counts, schedule.epochs)
    exits = VARIANTS[run.variant]

    loss = model.exit_loss
    assert isinstance(loss, losses.LongTailLoss)

    def next_epoch(stats: EpochStats) -> None:
        if isinstance(loss, losses.DeferredReweighting):
            loss.set_epoch(stats.epoch)
        if exits is not None:
            model.train_thresholds = _train_thresholds(
                exits, loss, len(data.class_counts), epoch=stats.epoch, epochs=schedule.epochs
            )

    last = train(model, data.train, schedule, seed=run.seed, on_epoch=next_epoch)[-1]
    if run.loss == "logit_adjustment":
        adjust_logits_(model, data.class_counts)
    flops = count_flops(model, data.test.images[:1])
    points = _operating_points(model, data, flops)
    return as_json(
        {
            "class_order": [int(name) for name in data.class_names],
            "class_counts": data.class_counts,
            "schedule": asdict(schedule),
            "last_epoch": {
                "loss": last.loss,
                "accuracy": last.accuracy,
                "exit_shares": last.exit_shares,
            },
            "thresholds": {name: point.threshold for name, point in points.items()},
            "validation": {name: point.accuracy for name, point in points.items()},
            "test": {
                name: _test(model, data, flops, point.threshold) for name, point in points.items()
            },
            "seconds": time.perf_counter() - start,
            "environment": environment(),
        }
    )


def _operating_points(model: ELF, data: DigitSplits, flops: Flops) -> dict[str, OperatingPoint]:
    table = exit_table(model, batches(data.validation))
    if len(model.stages) == 1:
        return {"full": one_number.sweep(table, flops, [math.inf])[0]}
    points = one_number.sweep(table, flops)
    affordable = [p for p in points if p.flops <= FLOPS_LIMIT * flops.without_exits]
    return {
        "full": points[-1],
        "safe": min(
            (p for p in reversed(points) if p.accuracy >= points[-1].accuracy),
            key=lambda p: (p.flops, -p.accuracy),
        ),
        "best": max(affordable, key=lambda p: (p.accuracy, p.threshold)),
    }


def _test(model: ELF, data: DigitSplits, flops: Flops, threshold: float) -> dict[str, Any]:
    model.thresholds.fill_(threshold)
    scale = getattr(model.exit_loss, "scale", 1.0)
    metrics = ELFMetrics(data.class_counts, flops, temperatures=1 / scale)
    metrics.update(predict(model, data.test.images), data.test.targets)
    values = metrics.compute()
    return {name: values[name] for name in KEPT}


def as_json(value: Any) -> Any:
    """`value` as JSON has it: infinity is None, and six decimals do."""
    if isinstance(value, dict):
        return {key: as_json(v) for key, v in value.items()}
    if isinstance(value, list):
        return [as_json(v) for v in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
