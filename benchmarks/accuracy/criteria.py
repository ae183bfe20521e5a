"""Exit criteria at equal FLOPs on long-tailed digits.

    python -m benchmarks.accuracy.criteria [--seeds N] [--epochs N]

Trains a network per loss and seed, with exits by `confidence`. Then every criterion, and `energy`
as a function of the logits, chooses its threshold on validation within each limit of FLOPs, and the
test part is evaluated once. Prints the accuracy and its paired difference to `confidence`, mean and
standard deviation over the seeds. About 20 seconds per network on one thread.
"""

from __future__ import annotations

import argparse
from statistics import fmean, stdev

import torch
from torch import Tensor

from elf_fast import ELF, criteria
from elf_fast.data.digits import DigitSplits
from elf_fast.demo.loop import Schedule, batches, train
from elf_fast.flops import Flops, count_flops
from elf_fast.policy import one_number
from elf_fast.policy.exit_table import exit_table

from . import trial
from .runs import Run

LOSSES = ("ce", "balanced_softmax")
IMBALANCE = 100
#: Shares of the FLOPs of the network without exits.
LIMITS = (0.3, 0.4, 0.5, 0.6, 0.8)


def energy(logits: Tensor) -> Tensor:
    """log sum exp z: minus the energy of Liu et al. (arXiv 2010.03759, eq. 4) at temperature 1."""
    return torch.logsumexp(logits, dim=1)


def trained(loss: str, seed: int, epochs: int) -> tuple[ELF, DigitSplits]:
    data = trial.split(IMBALANCE, seed)
    model = trial.build(Run(IMBALANCE, loss, "conv", "keep", seed), data.class_counts, epochs)
    train(model, data.train, Schedule(epochs=epochs), seed=seed)
    return model, data


def accuracies(
    model: ELF, data: DigitSplits, flops: Flops, criterion: str | criteria.Score
) -> list[tuple[float, float]]:
    """For each limit the threshold chosen on validation, and the test accuracy there."""
    model.criterion = criterion
    validation, test = (exit_table(model, batches(part)) for part in (data.validation, data.test))
    values = validation.criterion.candidates(validation.statistic[:-1])
    points = one_number.sweep(validation, flops, values)
    on_test = {p.threshold: p.accuracy for p in one_number.sweep(test, flops, values)}
    limits = (share * flops.without_exits for share in LIMITS)
    chosen = [one_number.choose(points, limit).threshold for limit in limits]
    return [(threshold, on_test[threshold]) for threshold in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=6, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--epochs", type=int, default=40, metavar="N", help="(default: %(default)s)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    tried: list[str | criteria.Score] = [*criteria.TABLE, energy]
    print(f"accuracy in %, and points against confidence, at shares of the FLOPs of {LIMITS}")
    for loss in LOSSES:
        found: dict[str, list[list[float]]] = {}  # [seeds][limits] by criterion
        for seed in range(options.seeds):
            model, data = trained(loss, seed, options.epochs)
            flops = count_flops(model, data.test.images[:1])
            for criterion in tried:
                name = criteria.find(criterion).name
                at_limits = accuracies(model, data, flops, criterion)
                found.setdefault(name, []).append([accuracy for _, accuracy in at_limits])
        for name, of_seeds in found.items():
            cells = []
            for ours, theirs in zip(
                zip(*of_seeds, strict=True), zip(*found["confidence"], strict=True), strict=True
            ):
                points = [100 * (a - b) for a, b in zip(ours, theirs, strict=True)]
                spread = stdev(points) if len(points) > 1 else 0.0
                cells.append(f"{100 * fmean(ours):5.1f} ({fmean(points):+.1f} ± {spread:.1f})")
            print(f"{loss:17} {name:11} {'  '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
