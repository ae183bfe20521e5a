"""The operators as functions, with checked arguments and the exact number of survivors.

Each computes what the function of that name in `reference.py` does, in one kernel if the device
has one, else by the reference. `elf_fast.report()` shows which kernels are used.

Derivatives in forward mode and by torch.func are those of the reference. Under torch.func.vmap only
`compact`, and `exit_loss` without a threshold, can run: how many samples survive is a number that
vmap cannot read, and torch raises.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import checks, criteria, ops
from .arguments import call, class_vectors, counted, gate_settings
from .reference import ExitGate, ExitHeadOutput, ExitLoss

__all__ = ["compact", "compact_", "exit_gate", "exit_head", "exit_loss"]


def exit_gate(
    logits: Tensor,
    threshold: float | Tensor,
    *,
    temperature: float | Tensor = 1.0,
    criterion: str = "confidence",
    target: Tensor | None = None,
) -> ExitGate:
    """Which samples leave at an exit: softmax statistics, test and survivors in one pass.

    Args:
        logits: [N, C] float32, float64, bfloat16 or float16; arithmetic is float32 (float64).
        threshold: in [0, 1], or inf (entropy: -inf) for never; a scalar or [C], one per predicted
            class.
        temperature: a number above 0 that divides the logits. It gets no gradient.
        criterion: "confidence" (max probability), "margin" (top-1 minus top-2) or "entropy"
            (normalised; a sample leaves at or below the threshold).
        target: [N] int64; a sample then leaves only if its prediction is right.

    Returns:
        ExitGate(confidence [N], prediction [N], survivors [n] ascending). The confidence is
        differentiable. A NaN in a row never leaves; ties take the lowest class.

    Raises:
        ValueError, TypeError: naming the argument.

    Examples:
        >>> gate = exit_gate(torch.tensor([[9.0, 0.0], [0.1, 0.0]]), 0.9)
        >>> gate.survivors
        tensor([1])
    """
    checks.logits(logits)
    N, C = logits.shape
    t, T, code = gate_settings(threshold, temperature, criterion, logits.dtype, C, logits.device)
    if target is not None:
        checks.target_shape(target, N, logits.device)
        target = target.contiguous()
    confidence, prediction, survivors, count = call(
        ops.exit_gate,
        (logits,),
        (logits, t, T, code, target, False),
        lambda: checks.target_range(target, C),
    )
    return ExitGate(confidence, prediction, counted(survivors, count, target, C))


def exit_head(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: float | Tensor,
    *,
    temperature: float | Tensor = 1.0,
    criterion: str = "confidence",
    target: Tensor | None = None,
    return_logits: bool = True,
) -> ExitHeadOutput:
    """Global average pool, linear classifier and gate in one call.

    Args:
        features: [N, D, H, W] in any memory format, tokens [N, T, D] or vectors [N, D].
        weight: [C, D].
        bias: [C] or None.
        threshold, temperature, criterion, target: as for `exit_gate`.
        return_logits: False returns no logits; a fused kernel then need not write them.

    Returns:
        ExitHeadOutput(logits [N, C] or None, confidence [N], prediction [N], survivors [n]). The
        logits are differentiable in features, weight and bias; the confidence has no gradient.

    Under torch.autocast it behaves like nn.Linear followed by a float32 softmax.
    """
    checks.poolable(features)
    checks.classifier(weight, bias, features.shape[2 if features.dim() == 3 else 1])
    C = weight.shape[0]
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            checks.same_device(name, parameter, features.device)
    t, T, code = gate_settings(threshold, temperature, criterion, weight.dtype, C, features.device)
    if target is not None:
        checks.target_shape(target, features.shape[0], features.device)
        target = target.contiguous()
    logits, _, confidence, prediction, survivors, count = call(
        ops.exit_head,
        (features, weight, bias),
        (features, weight, bias, t, T, code, target, False, return_logits),
        lambda: checks.target_range(target, C),
    )
    survivors = counted(survivors, count, target, C)
    return ExitHeadOutput(logits if return_logits else None, confidence, prediction, survivors)


def compact(features: Tensor, survivors: Tensor) -> Tensor:
    """The survivors' rows of a batch, as a dense batch in the same memory format.

    Args:
        features: [N, ...], any dtype.
        survivors: [n] int64, ascending, in [0, N).

    Returns:
        [n, ...]; differentiable in the features.
    """
    checks.features(features)
    N = features.shape[0]
    checks.survivors_shape(survivors, N, features.device)
    return call(
        ops.compact,
        (features,),
        (features, survivors.contiguous()),
        lambda: checks.survivors_values(survivors, N),
    )


def compact_(features: Tensor, survivors: Tensor) -> Tensor:
    """Moves the survivors into the first n rows of `features`, in place and out of order.

    Survivors in rows below n stay where they are. Survivors in later rows move into the free rows
    below n, so about 2 s (1 - s) of the batch moves instead of 2 s (s = n / N). Rows from n on are
    not changed.

    Args:
        features: [N, ...] without a gradient, every sample dense in memory.
        survivors: [n] int64, ascending, in [0, N).

    Returns:
        order [n] int64: row j now holds what was row order[j].
    """
    checks.features(features)
    N = features.shape[0]
    checks.survivors_shape(survivors, N, features.device)
    if features.requires_grad and torch.is_grad_enabled():
        raise ValueError("features: expected no gradient for compact_, got requires_grad=True")
    if ops.tangents_active() and forward_ad.unpack_dual(features).tangent is not None:
        raise ValueError("features: expected no tangent for compact_, got one")

    def explain() -> None:
        checks.movable(features)
        checks.survivors_values(survivors, N)

    order = call(ops.compact_, (), (features, survivors.contiguous(), None), explain)
    if not features.is_inference():
        torch.autograd.graph.increment_version(features)
    return order


def exit_loss(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    gamma: float = 0.0,
    scale: float = 1.0,
    margins: Tensor | None = None,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    threshold: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    criterion: str = "confidence",
) -> ExitLoss:
    """The long-tail loss family per sample, with the training gate on the same logits.

        x = scale * (logits - margins_y e_y) + bias,  q = softmax(x),  p = q_y
        loss = weight_y (1 - p)^gamma [(1 - eps) (-log p) + eps mean_c(-log q_c)]

    Args:
        logits: [N, C] as for `exit_gate`.
        target: [N] int64.
        weight, margins, bias: [C] or None. They and the settings carry no gradient.
        gamma: at least 0.
        scale: above 0.
        label_smoothing: eps in [0, 1].
        threshold: None (no sample leaves), or as for `exit_gate`, with `temperature`, `criterion`;
            the gate reads the logits, not x, and a sample leaves only if its prediction is right.

    Returns:
        ExitLoss(loss [N], confidence [N], prediction [N], survivors [n]); the loss is
        differentiable in the logits. `reference.exit_loss` gives the sources of the formula.

    Raises:
        ValueError, TypeError: naming the argument. On a GPU a target out of range raises only
            with a threshold. Without one no call waits for the device: the sample's loss is NaN.
    """
    checks.logits(logits)
    N, C = logits.shape
    checks.target_shape(target, N, logits.device)
    nobody_leaves = threshold is None
    if nobody_leaves:
        threshold = criteria.by_name(criterion).off
    t, T, code = gate_settings(threshold, temperature, criterion, logits.dtype, C, logits.device)
    vectors = class_vectors(logits, weight=weight, margins=margins, bias=bias)
    checks.at_least("gamma", gamma, 0.0)
    checks.positive("scale", scale)
    checks.at_least("label_smoothing", label_smoothing, 0.0, 1.0)
    loss, _, confidence, prediction, survivors, count = call(
        ops.exit_loss,
        (logits,),
        (logits, target.contiguous(), *vectors, float(gamma), float(scale), float(label_smoothing),
         t, T, code),
        lambda: checks.target_range(target, C),
    )  # fmt: skip
    if not nobody_leaves:
        survivors = counted(survivors, count, target, C)
    return ExitLoss(loss, confidence, prediction, survivors)
