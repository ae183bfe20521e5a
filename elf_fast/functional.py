"""The operators as functions: checked arguments, exact survivors.

Each does what its namesake in `reference.py` does, in one kernel where the device has one. On the
CPU: `csrc/cpu`. Where no native kernel serves, the reference does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backend as _backend  # noqa: F401  (loads the native kernels)
from . import checks, ops
from .reference import ExitGate, ExitHeadOutput, ExitLoss

__all__ = ["compact", "compact_", "exit_gate", "exit_head", "exit_loss"]


def _call(
    op: Any,
    differentiable: tuple[Tensor | None, ...],
    args: tuple[Any, ...],
    explain: Callable[[], object] | None = None,
) -> Any:
    """op(*args), past the autograd layer (about 5 us) where nothing asks for a gradient.

    Kernels refuse targets and survivors that would lead them astray before they touch anything;
    reading those values here, too, would cost more than a small kernel. When one refuses,
    `explain` looks again and says what is wrong.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        if torch.is_inference_mode_enabled() or (
            torch.is_grad_enabled()
            and any(t is not None and t.requires_grad for t in differentiable)
        ):
            return op(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)
    except (RuntimeError, IndexError):
        if explain is not None:
            explain()
        raise


def _exact(survivors: Tensor, count: Tensor, target: Tensor | None, classes: int) -> Tensor:
    """The first `count` survivors. Waits for the device, once, and hears of a bad target."""
    n = int(count)
    if n < 0:
        checks.target_range(target, classes)
    return survivors[:n]


def _setting(name: str, value: float | Tensor, logits_dtype: torch.dtype, classes: int, device):
    """A threshold or temperature as the kernels take it: [] or [C] in the arithmetic dtype."""
    dtype = torch.float64 if logits_dtype == torch.float64 else torch.float32
    if not isinstance(value, Tensor):
        # On the CPU for any device, as PyTorch's own scalars; float32 first, as the thresholds of
        # ELF are, so that both say the same for float64 logits.
        number = checks.number(name, value)
        return torch.scalar_tensor(number, dtype=torch.float32, device="cpu").to(dtype)
    if value.dim() > 1 or (value.dim() == 1 and (value.shape[0] != classes or name != "threshold")):
        shape = f"[] or [{classes}]" if name == "threshold" else "[]"
        raise ValueError(f"{name}: expected shape {shape}, got {checks.describe(value)}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating tensor, got {checks.describe(value)}")
    if value.dim() == 1:
        checks.same_device(name, value, device)
    return value.float().to(dtype).contiguous()


def _made_gate_settings(threshold, temperature, criterion, logits_dtype, classes, device):
    code = checks.criterion(criterion)
    # Values are read on the CPU only: reading them from another device would wait for it.
    if not isinstance(threshold, Tensor):
        checks.threshold_values("threshold", checks.number("threshold", threshold), criterion)
    elif threshold.device.type == "cpu" and not torch.compiler.is_compiling():
        checks.threshold_values("threshold", threshold, criterion)
    if not isinstance(temperature, Tensor) or (
        temperature.device.type == "cpu" and not torch.compiler.is_compiling()
    ):
        checks.positive("temperature", temperature)
    return (
        _setting("threshold", threshold, logits_dtype, classes, device),
        _setting("temperature", temperature, logits_dtype, classes, device),
        code,
    )


@functools.lru_cache(maxsize=256)
def _known_gate_settings(threshold: float, temperature: float, criterion: str, dtype: torch.dtype):
    """Numbers, checked and made into tensors once: that saves 3 us a call."""
    with torch.inference_mode(False):  # or autograd could not save them in a later call
        return _made_gate_settings(threshold, temperature, criterion, dtype, 0, None)


def _gate_settings(threshold, temperature, criterion, logits_dtype, classes, device):
    """Threshold, temperature and criterion as the kernels take them, checked."""
    if (
        type(threshold) is type(temperature) is float
        and type(criterion) is str
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
    ):
        return _known_gate_settings(threshold, temperature, criterion, logits_dtype)
    return _made_gate_settings(threshold, temperature, criterion, logits_dtype, classes, device)


def _class_vectors(logits: Tensor, **vectors: Tensor | None) -> list[Tensor | None]:
    """Per-class settings [C] as the kernels take them: detached, in the arithmetic dtype."""
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    for name, value in vectors.items():
        checks.per_class(name, value, logits.shape[1], logits.device)
    return [None if v is None else v.detach().to(acc).contiguous() for v in vectors.values()]


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
        temperature: > 0, divides the logits.
        criterion: "confidence" (max probability), "margin" (top-1 minus top-2) or "entropy"
            (normalised; a sample leaves at or below the threshold).
        target: [N] int64; a sample then leaves only if its prediction is right.

    Returns:
        ExitGate(confidence [N], prediction [N], survivors [n] ascending). The confidence is
        differentiable. A NaN in a row never leaves; ties take the lowest class.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> gate = exit_gate(torch.tensor([[9.0, 0.0], [0.1, 0.0]]), 0.9)
        >>> gate.survivors
        tensor([1])
    """
    checks.logits(logits)
    N, C = logits.shape
    t, T, code = _gate_settings(threshold, temperature, criterion, logits.dtype, C, logits.device)
    if target is not None:
        checks.target_shape(target, N, logits.device)
        target = target.contiguous()
    confidence, prediction, survivors, count = _call(
        ops.exit_gate,
        (logits,),
        (logits, t, T, code, target, False),
        lambda: checks.target_range(target, C),
    )
    return ExitGate(confidence, prediction, _exact(survivors, count, target, C))


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
    """Global average pool, linear classifier and gate in one.

    Args:
        features: [N, D, H, W] in any memory format, tokens [N, T, D] or vectors [N, D].
        weight: [C, D]. bias: [C] or None.
        threshold, temperature, criterion, target: as for `exit_gate`.
        return_logits: False saves writing them, where a fused kernel has no need to.

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
    t, T, code = _gate_settings(threshold, temperature, criterion, weight.dtype, C, features.device)
    if target is not None:
        checks.target_shape(target, features.shape[0], features.device)
        target = target.contiguous()
    logits, _, confidence, prediction, survivors, count = _call(
        ops.exit_head,
        (features, weight, bias),
        (features, weight, bias, t, T, code, target, False, return_logits),
        lambda: checks.target_range(target, C),
    )
    survivors = _exact(survivors, count, target, C)
    return ExitHeadOutput(logits if return_logits else None, confidence, prediction, survivors)


def compact(features: Tensor, survivors: Tensor) -> Tensor:
    """The survivors' rows of a batch, as a dense batch in the same memory format.

    Args:
        features: [N, ...], any dtype. survivors: [n] int64, ascending, in [0, N).

    Returns:
        [n, ...]; differentiable in the features.
    """
    checks.features(features)
    N = features.shape[0]
    checks.survivors_shape(survivors, N, features.device)
    return _call(
        ops.compact,
        (features,),
        (features, survivors.contiguous()),
        lambda: checks.survivors_values(survivors, N),
    )


def compact_(features: Tensor, survivors: Tensor) -> Tensor:
    """Moves the survivors into the first n rows of `features`, in place and out of order.

    Rows below n that survive stay where they are and survivors of the tail fill the holes, so about
    2 s (1 - s) of the batch moves instead of 2 s (s = n / N). Rows from n on are left as they were.

    Args:
        features: [N, ...] without a gradient, every sample dense in memory. survivors: as above.

    Returns:
        order [n] int64: row j now holds what was row order[j].
    """
    checks.features(features)
    N = features.shape[0]
    checks.survivors_shape(survivors, N, features.device)
    if features.requires_grad and torch.is_grad_enabled():
        raise ValueError("features: expected no gradient for compact_, got requires_grad=True")

    def explain() -> None:
        checks.movable(features)
        checks.survivors_values(survivors, N)

    order = _call(ops.compact_, (), (features, survivors.contiguous(), None), explain)
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
        logits: [N, C] as for `exit_gate`. target: [N] int64.
        weight, margins, bias: [C] or None. They and the settings carry no gradient.
        gamma: >= 0. scale: > 0. label_smoothing: eps in [0, 1].
        threshold: None (no sample leaves), or as for `exit_gate`, with `temperature`, `criterion`;
            the gate reads the logits, not x, and asks for a right prediction.

    Returns:
        ExitLoss(loss [N], confidence [N], prediction [N], survivors [n]); the loss is
        differentiable in the logits. `reference.exit_loss` gives the sources of the formula.

    Raises:
        ValueError, TypeError: naming the argument. On a GPU a target out of range is named only
            with a threshold; without one nothing waits for the device: the sample's loss is NaN.
    """
    checks.logits(logits)
    N, C = logits.shape
    checks.target_shape(target, N, logits.device)
    nobody_leaves = threshold is None
    if nobody_leaves:
        threshold = -math.inf if criterion == "entropy" else math.inf
    t, T, code = _gate_settings(threshold, temperature, criterion, logits.dtype, C, logits.device)
    vectors = _class_vectors(logits, weight=weight, margins=margins, bias=bias)
    checks.at_least("gamma", gamma, 0.0)
    checks.positive("scale", scale)
    checks.at_least("label_smoothing", label_smoothing, 0.0, 1.0)
    loss, _, confidence, prediction, survivors, count = _call(
        ops.exit_loss,
        (logits,),
        (logits, target.contiguous(), *vectors, float(gamma), float(scale), float(label_smoothing),
         t, T, code),
        lambda: checks.target_range(target, C),
    )  # fmt: skip
    if not nobody_leaves:
        survivors = _exact(survivors, count, target, C)
    return ExitLoss(loss, confidence, prediction, survivors)
