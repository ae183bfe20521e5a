"""Long-tail losses: modules for the named members of one family, `functional.exit_loss`.

Each module computes the family's arguments from `class_counts` [C], the number of training samples
of every class. Use one alone on any model's logits, or as the `exit_loss` of an ELF, where it runs
fused with the gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import checks, criteria, functional

__all__ = [
    "BalancedSoftmaxLoss",
    "ClassBalancedLoss",
    "CrossEntropyLoss",
    "DeferredReweighting",
    "FocalLoss",
    "LDAMLoss",
    "LogitAdjustedLoss",
    "LongTailLoss",
    "class_balanced_weight",
    "log_prior",
]


class LongTailLoss(nn.Module):
    """weight_y (1 - p)^gamma CE(scale (z - margins_y e_y) + bias, y); see `functional.exit_loss`.

    Args:
        weight, margins, bias: [C] or None.
        gamma: at least 0.
        scale: above 0.
        label_smoothing: in [0, 1].
        reduction: "mean" (over samples, not over weights) or "none".

    Shape: logits [N, C], target [N] int64 -> [] or, with reduction="none", [N]; float32.
    """

    weight: Tensor | None
    margins: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        *,
        weight: Tensor | None = None,
        gamma: float = 0.0,
        scale: float = 1.0,
        margins: Tensor | None = None,
        bias: Tensor | None = None,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        checks.at_least("gamma", gamma, 0.0)
        checks.positive("scale", scale)
        checks.at_least("label_smoothing", label_smoothing, 0.0, 1.0)
        if reduction not in ("mean", "none"):
            raise ValueError(f'reduction: expected "mean" or "none", got {reduction!r}')
        C = None
        for name, value in (("weight", weight), ("margins", margins), ("bias", bias)):
            if value is not None:
                checks.tensor(name, value)
                C = value.numel() if C is None else C
                checks.per_class(name, value, C, value.device)
            self.register_buffer(name, value)
        self.gamma = float(gamma)
        self.scale = float(scale)
        self.label_smoothing = float(label_smoothing)
        self.reduction = reduction

    def arguments(self) -> dict[str, Any]:
        """The family's arguments, as `functional.exit_loss` and its reference take them."""
        return {
            "weight": self.weight,
            "gamma": self.gamma,
            "scale": self.scale,
            "margins": self.margins,
            "bias": self.bias,
            "label_smoothing": self.label_smoothing,
        }

    def as_family(self) -> dict[str, Any] | None:
        """`arguments` if they define the loss completely, so that an ELF can run it fused; None if
        `forward` is another one or has hooks. The ELF then calls the loss."""
        changed = (
            type(self).forward is not LongTailLoss.forward
            or "forward" in self.__dict__
            or self._forward_hooks
            or self._forward_pre_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
        )
        return None if changed else self.arguments()

    def margin_thresholds(self, thresholds: float | Sequence[float] | Tensor) -> Tensor:
        """`train_thresholds` with which the exit test in training subtracts the margins from the
        logits, as this loss does, at temperature 1 / scale (criterion "confidence").

        In training a sample leaves only if its prediction is right, so the exit test compares the
        target's probability p with t. With the margin m = scale * margins_y subtracted, that
        probability is p / (p + (1 - p) e^m). It is at least t if p >= 1 / (1 + e^-m (1 - t) / t),
        and the right-hand side is the threshold returned. For m >= log(1 / t - 1) + 17 it rounds to
        1 in float32; then only samples whose p rounds to 1 leave.

        Shape: thresholds [], [E-1] or [E-1, C], in [0, 1] or inf -> [C] or [E-1, C], float32.

        Raises:
            ValueError: thresholds of another shape or outside their range, or a loss without
                margins.
        """
        if self.margins is None:
            raise ValueError(f"margins: expected a loss with margins, got {type(self).__name__}")
        t = torch.as_tensor(thresholds, dtype=torch.float64, device=self.margins.device)
        C = len(self.margins)
        if t.dim() > 2 or (t.dim() == 2 and t.shape[1] != C):
            raise ValueError(
                f"thresholds: expected shape [], [E-1] or [E-1, {C}], got {list(t.shape)}"
            )
        t = t if t.dim() == 2 else t[..., None]
        checks.threshold_values("thresholds", t, criteria.by_name("confidence"))
        odds = torch.where(t.isinf(), 0.0, (1 - t) / t)
        wanted = 1 / (1 + odds * torch.exp(-self.scale * self.margins.double()))
        return torch.where(t.isinf(), t, wanted).float()

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        losses = functional.exit_loss(logits, target, **self.arguments()).loss
        return losses if self.reduction == "none" else losses.sum() / max(len(losses), 1)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, scale={self.scale}, label_smoothing={self.label_smoothing}"


def log_prior(class_counts: Sequence[int] | Tensor) -> Tensor:
    """Log of the class frequencies: log(n_c / sum_k n_k), [C] float64."""
    counts = checks.class_counts(class_counts)
    return (counts / counts.sum()).log()


def class_balanced_weight(class_counts: Sequence[int] | Tensor, beta: float = 0.9999) -> Tensor:
    """Weights by the effective number of samples, w_c ~ (1 - beta) / (1 - beta^n_c), scaled to mean
    1 over the classes (Cui et al., arXiv 1901.05555, eq. 3), [C] float64. With beta = 0 they are
    equal; with beta near 1 they are proportional to 1 / n_c.

    Raises:
        ValueError: beta outside [0, 1), or a class without samples.
    """
    checks.at_least("beta", beta, 0.0, 1.0)
    if beta == 1.0:
        raise ValueError("beta: expected a number in [0, 1), got 1.0")
    effective_num = (1 - beta ** checks.class_counts(class_counts)) / (1 - beta)
    weight = 1 / effective_num
    return weight / weight.mean()


class CrossEntropyLoss(LongTailLoss):
    """-log p_y."""

    def __init__(self, *, label_smoothing: float = 0.0, reduction: str = "mean") -> None:
        super().__init__(label_smoothing=label_smoothing, reduction=reduction)


class FocalLoss(LongTailLoss):
    """(1 - p_y)^gamma (-log p_y) (Lin et al., arXiv 1708.02002, eq. 4)."""

    def __init__(
        self, gamma: float = 2.0, *, label_smoothing: float = 0.0, reduction: str = "mean"
    ) -> None:
        super().__init__(gamma=gamma, label_smoothing=label_smoothing, reduction=reduction)


class ClassBalancedLoss(LongTailLoss):
    """-w_y log p_y with `class_balanced_weight`; gamma > 0 makes it focal."""

    def __init__(
        self,
        class_counts: Sequence[int] | Tensor,
        *,
        beta: float = 0.9999,
        gamma: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            weight=class_balanced_weight(class_counts, beta).float(),
            gamma=gamma,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )


class LDAMLoss(LongTailLoss):
    """CE(scale (z - margins_y e_y), y) with margins proportional to n_c^(-1/4), the largest equal
    to max_margin (Cao et al., arXiv 1906.07413, eq. 13).

    Meant for a normalised classifier, whose logits are cosines: `classifiers.CosineClassifier` says
    which settings the exit test then needs. In training pass `margin_thresholds(...)` as
    `train_thresholds`: with thresholds that ignore the margins nearly all samples leave early, and
    the last exit learns from hardly any (docs/accuracy.md).
    """

    def __init__(
        self,
        class_counts: Sequence[int] | Tensor,
        *,
        max_margin: float = 0.5,
        scale: float = 30.0,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        checks.positive("max_margin", max_margin)
        margins = checks.class_counts(class_counts) ** -0.25
        margins = margins * (max_margin / margins.max())
        super().__init__(
            weight=weight,
            scale=scale,
            margins=margins.float(),
            label_smoothing=label_smoothing,
            reduction=reduction,
        )


class BalancedSoftmaxLoss(LongTailLoss):
    """CE(z + log n, y) (Ren et al., arXiv 2007.10740, eq. 4)."""

    def __init__(
        self,
        class_counts: Sequence[int] | Tensor,
        *,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            bias=checks.class_counts(class_counts).log().float(),
            label_smoothing=label_smoothing,
            reduction=reduction,
        )


class LogitAdjustedLoss(LongTailLoss):
    """CE(z + tau log prior, y) (Menon et al., arXiv 2007.07314, eq. 10)."""

    def __init__(
        self,
        class_counts: Sequence[int] | Tensor,
        *,
        tau: float = 1.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        checks.at_least("tau", tau, 0.0)
        super().__init__(
            bias=(tau * log_prior(class_counts)).float(),
            label_smoothing=label_smoothing,
            reduction=reduction,
        )


class DeferredReweighting(LongTailLoss):
    """`loss` unchanged before epoch `start_epoch`, and times `class_balanced_weight` from that
    epoch on (DRW: Cao et al., arXiv 1906.07413, Algorithm 1).

    Call `set_epoch` before every epoch, not between a loss and its backward pass, which reads the
    weights. The state dict holds the current weights, so a loaded loss continues with them.

    Args:
        loss: any member of the family that has no `forward` of its own and no hooks; its settings
            are kept. If it has weights, they are multiplied by `class_balanced_weight`.
        class_counts: [C] training samples of every class.
        start_epoch: the first epoch with the class-balanced weights, counted from 0.
        beta: passed to `class_balanced_weight`.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """

    weight: Tensor
    _before: Tensor
    _after: Tensor

    def __init__(
        self,
        loss: LongTailLoss,
        class_counts: Sequence[int] | Tensor,
        *,
        start_epoch: int,
        beta: float = 0.9999,
    ) -> None:
        if not isinstance(loss, LongTailLoss):
            raise TypeError(
                f"loss: expected a loss of elf_fast.losses, got {checks.describe(loss)}"
            )
        if loss.as_family() is None:
            raise ValueError(
                "loss: expected one without hooks and with the forward of LongTailLoss, got "
                f"{checks.describe(loss)}"
            )
        checks.integer("start_epoch", start_epoch, 0)
        after = class_balanced_weight(class_counts, beta).float()
        before = torch.ones_like(after)
        if loss.weight is not None:
            checks.per_class("loss.weight", loss.weight, len(after), after.device)
            before, after = loss.weight, loss.weight * after
        super().__init__(**{**loss.arguments(), "weight": before.clone()}, reduction=loss.reduction)
        self.register_buffer("_before", before.clone(), persistent=False)
        self.register_buffer("_after", after, persistent=False)
        self.start_epoch = start_epoch
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Sets the weights for an epoch, counted from 0."""
        checks.integer("epoch", epoch, 0)
        self.weight.copy_(self._before if epoch < self.start_epoch else self._after)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, start_epoch={self.start_epoch}"
