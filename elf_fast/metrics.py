"""Accuracy by class frequency, F1, confusions, calibration, exit shares and FLOPs of an ELF, over
any number of batches and ranks. Needs torchmetrics (the extra `train`).

Shapes: N samples, C classes, E exits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_calibration_error
from torchmetrics.utilities import dim_zero_cat

from . import checks
from .base import ELFOutput
from .flops import Flops
from .groups import FEW_BELOW, GROUPS, MANY_ABOVE, class_groups
from .reference import statistic

__all__ = [
    "FEW_BELOW",
    "GROUPS",
    "MANY_ABOVE",
    "ELFMetrics",
    "calibration_error",
    "class_groups",
]

CALIBRATION_BINS = 15  # Guo et al., arXiv 1706.04599
CONFUSIONS = 10  # pairs of classes that `compute` names


class ELFMetrics(Metric):
    """All metrics of an evaluation of an ELF, summed over batches and ranks by torchmetrics.

    A network without exits is an ELF of one stage: E = 1.

    Args:
        class_counts: [C] training samples of every class; they define many, medium and few.
        flops: `elf_fast.flops.count_flops` of the evaluated model.
        temperatures: a number, or one per exit [E], by which `ece` divides the logits.
        prior: [C] weights of the classes, for a target in which they are distributed otherwise than
            in the evaluated part. Each of the n_c samples of class c then counts prior_c / n_c in
            all accuracies, F1, shares and FLOPs, but not in `ece` and `confusions`. Classes
            without samples are left out. None: every sample counts 1.

    update(out, target): an `ELFOutput` of n samples and their classes [n] int64.

    compute() -> a dict that JSON can hold. Accuracies and shares lie in [0, 1]; a value is None if
    no sample contributes to it, such as for a group without classes.
        samples: N. samples_by_group {name}: of them, those of the group's classes.
        overall, many, medium, few, per_class [C]: accuracy.
        balanced_accuracy: the mean of per_class, which is macro recall.
        f1: macro F1, the mean of 2 TP / (2 TP + FP + FN) over the classes that are the target or
            the prediction of any sample.
        confusions: the wrong pairs of most samples, at most 10, each with its classes `target` and
            `prediction`, the number of `samples` and their `share` of the class's samples.
        ece: expected calibration error of max softmax(logits / T) in 15 bins (Guo et al.,
            arXiv 1706.04599, eq. 3); also None if one of these probabilities is NaN.
        exit_accuracy [E]: accuracy of the samples that left at each exit.
        exit_shares [E], exit_shares_by_group {name: [E]}, exit_shares_by_class [C][E]: share of the
            samples that left at each exit.
        early_wrong, early_wrong_by_group {name}: share of the samples that left before the last
            exit with a wrong prediction.
        flops_per_sample: the mean; flops_share: that mean over the FLOPs without exits.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """

    is_differentiable = False
    full_state_update = False

    temperature: Tensor  # [E]
    counts: Tensor  # [E, C, 2] int64: samples by exit, class, and wrong (0) or right (1)
    probability: list[Tensor]  # one [n] float32 per batch: probability of the prediction
    correct: list[Tensor]  # one [n] float32 per batch: 1 where the prediction is right
    # One [2 w] per batch: target and prediction of each of its w wrong samples in turn. float32,
    # because torchmetrics gathers the empty state of a rank without batches as float32.
    wrong: list[Tensor]

    def __init__(
        self,
        class_counts: Sequence[int] | Tensor,
        flops: Flops,
        *,
        temperatures: float | Sequence[float] | Tensor = 1.0,
        prior: Sequence[float] | Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.groups = class_groups(class_counts)
        self.flops = flops
        E, C = len(flops.stages), len(class_counts)
        temperature = torch.as_tensor(
            temperatures, dtype=torch.float32, device=checks.device_for(temperatures)
        )
        checks.positive("temperatures", temperature)
        if temperature.dim() > 1 or temperature.numel() not in (1, E):
            raise ValueError(
                f"temperatures: expected a number or {E}, one per exit, "
                f"got {checks.describe(temperatures)}"
            )
        self.register_buffer("temperature", temperature.expand(E).clone(), persistent=False)
        self.prior = None if prior is None else _checked_prior(prior, C)
        counts = torch.zeros(E, C, 2, dtype=torch.int64, device=temperature.device)
        self.add_state("counts", counts, dist_reduce_fx="sum")
        self.add_state("probability", [], dist_reduce_fx="cat")
        self.add_state("correct", [], dist_reduce_fx="cat")
        self.add_state("wrong", [], dist_reduce_fx="cat")

    def update(self, out: ELFOutput, target: Tensor) -> None:
        E, C, _ = self.counts.shape
        checks.logits(out.logits)
        if out.logits.shape[1] != C:
            raise ValueError(f"out: expected logits [n, {C}], got {list(out.logits.shape)}")
        checks.target_shape(target, len(out.logits), out.logits.device)
        checks.target_range(target, C)
        if bool((out.exit_index >= E).any()):
            raise ValueError(
                f"out: expected exit_index < {E}, the number of exits in flops, "
                f"got {int(out.exit_index.max())}"
            )
        correct = out.prediction == target
        cell = (out.exit_index * C + target) * 2 + correct
        # Not in place: a reset in inference mode makes `counts` an inference tensor, which must not
        # be written to outside of that mode.
        self.counts = self.counts + torch.bincount(cell, minlength=2 * E * C).view(E, C, 2)
        T = self.temperature[out.exit_index, None]
        self.probability.append(statistic(out.logits, T).float())
        self.correct.append(correct.float())
        self.wrong.append(torch.stack([target, out.prediction], 1)[~correct].flatten().float())

    def compute(self) -> dict[str, Any]:
        samples = self.counts.sum((0, 2)).double().cpu()  # [C]
        (target, prediction), times = _pairs(self.wrong)
        weight = self._weight(samples)
        counts = self.counts.double().cpu() * weight[:, None]
        groups = {name: counts[:, classes].sum(1) for name, classes in self.groups.items()}
        by_class = counts.unbind(1)
        total = counts.sum(1)
        per_class = [_accuracy(c) for c in self.counts.double().cpu().unbind(1)]
        present = [a for a in per_class if a is not None]
        seen = total.sum(1)
        flops = self.flops.mean(seen.tolist()) if bool(seen.any()) else None
        right = counts[..., 1].sum(0)
        falsely = torch.zeros_like(right)  # [C] what counts as predicted and is of another class
        falsely.index_add_(0, prediction, times * weight[target])
        return {
            "samples": int(samples.sum()),
            "samples_by_group": {
                name: int(samples[classes].sum()) for name, classes in self.groups.items()
            },
            "overall": _accuracy(total),
            **{name: _accuracy(group) for name, group in groups.items()},
            "balanced_accuracy": sum(present) / len(present) if present else None,
            "f1": _f1(right, counts.sum((0, 2)), falsely),
            "per_class": per_class,
            "confusions": _confusions(target, prediction, times, samples),
            "ece": self._calibration_error(),
            "exit_accuracy": [_accuracy(at_exit[None]) for at_exit in total],
            "exit_shares": _exit_shares(total),
            "exit_shares_by_group": {name: _exit_shares(g) for name, g in groups.items()},
            "exit_shares_by_class": [_exit_shares(c) for c in by_class],
            "early_wrong": _early_wrong(total),
            "early_wrong_by_group": {name: _early_wrong(g) for name, g in groups.items()},
            "flops_per_sample": flops,
            "flops_share": None if flops is None else flops / self.flops.without_exits,
        }

    def accuracies(self, correct: Tensor, target: Tensor) -> list[float | None]:
        """[K] accuracy of K other classifiers on the samples `target` [N], weighted by the prior,
        if there is one. correct: [K, N] bool."""
        C = self.counts.shape[1]
        samples = torch.bincount(target, minlength=C)
        right = torch.stack([torch.bincount(target[row], minlength=C) for row in correct])
        counts = torch.stack([samples - right, right], -1) * self._weight(samples)[:, None]
        return [_accuracy(of_one) for of_one in counts]

    def _weight(self, samples: Tensor) -> Tensor:
        """[C] float64 how much a sample of each class counts, from the samples [C] of each."""
        if self.prior is None:
            return torch.ones(len(samples), dtype=torch.float64, device="cpu")
        return self.prior / samples.clamp(1)

    def _calibration_error(self) -> float | None:
        if not bool(self.counts.any()):
            return None
        return calibration_error(dim_zero_cat(self.probability), dim_zero_cat(self.correct))


def calibration_error(probability: Tensor, correct: Tensor) -> float | None:
    """Expected calibration error in 15 bins; see `ELFMetrics`. None without samples or with NaN.

    Args:
        probability: [N] of the predictions. correct: [N] whether they are right.
    """
    if not len(probability) or bool(probability.isnan().any()):
        return None
    # torchmetrics puts a probability of 1 into an extra bin beyond the last one.
    below_one = probability.clamp(max=1 - torch.finfo(torch.float32).eps / 2)
    return binary_calibration_error(below_one, correct.long(), n_bins=CALIBRATION_BINS).item()


def _checked_prior(prior: Sequence[float] | Tensor, C: int) -> Tensor:
    """[C] float64 on the CPU, with sum 1."""
    values = torch.as_tensor(prior, dtype=torch.float64, device="cpu")
    fits = values.shape == (C,) and bool(((values >= 0) & values.isfinite()).all())
    if not fits or not bool(values.sum() > 0):
        raise ValueError(
            f"prior: expected [{C}] finite weights of at least 0, not all 0, got "
            f"{checks.describe(prior)}"
        )
    return values / values.sum()


def _pairs(wrong: list[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """The different wrong pairs [2, P] int64, targets and predictions, and how often each occurs,
    [P] float64."""
    flat = dim_zero_cat(wrong) if len(wrong) else torch.zeros(0, device="cpu")
    pairs, times = flat.cpu().long().view(-1, 2).unique(dim=0, return_counts=True)
    return pairs.T, times.double()


def _f1(right: Tensor, of_class: Tensor, falsely: Tensor) -> float | None:
    """From [C] right samples, samples of the class, and others that were predicted as it."""
    seen = of_class + falsely > 0
    if not bool(seen.any()):
        return None
    return (2 * right / (of_class + right + falsely))[seen].mean().item()


def _confusions(
    target: Tensor, prediction: Tensor, times: Tensor, samples: Tensor
) -> list[dict[str, Any]]:
    first = times.argsort(descending=True, stable=True)[:CONFUSIONS]
    return [
        {"target": y, "prediction": p, "samples": int(n), "share": n / samples[y].item()}
        for y, p, n in zip(
            target[first].tolist(), prediction[first].tolist(), times[first].tolist(), strict=True
        )
    ]


# The functions below take counts [E, 2] of samples: by exit, and wrong (0) or right (1).


def _accuracy(counts: Tensor) -> float | None:
    n = counts.sum().item()
    return counts[:, 1].sum().item() / n if n else None


def _exit_shares(counts: Tensor) -> list[float] | None:
    n = counts.sum().item()
    return [at_exit / n for at_exit in counts.sum(1).tolist()] if n else None


def _early_wrong(counts: Tensor) -> float | None:
    n = counts.sum().item()
    return counts[:-1, 0].sum().item() / n if n else None
