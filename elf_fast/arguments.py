"""Calls operators with a user's arguments: settings become tensors, survivors are counted."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backend as _backend  # noqa: F401  (loads the native kernels)
from . import checks, criteria, ops

__all__ = ["call", "class_vectors", "counted", "cpu_scalars", "gate_settings", "in_arithmetic_of"]


def call(
    op: Any,
    differentiable: tuple[Tensor | None, ...],
    args: tuple[Any, ...],
    explain: Callable[[], object] | None = None,
) -> Any:
    """op(*args), past the autograd layer (about 5 us) if nothing asks for a derivative.

    Kernels check the values of targets and survivors before they use them as indices. A second
    check here would cost more than a small kernel. If a kernel raises, `explain` reads the values
    and raises an error that says what is wrong.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        if torch.is_inference_mode_enabled() or (
            torch.is_grad_enabled()
            and any(t is not None and t.requires_grad for t in differentiable)
        ):
            return op(*args)
        if ops.tangents_active():
            return op(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)
    except (RuntimeError, IndexError):
        if explain is not None:
            explain()
        raise


def counted(survivors: Tensor, count: Tensor, target: Tensor | None, classes: int) -> Tensor:
    """The first `count` survivors. Waits for the device once. A count of -1 reports a target out of
    range, which raises here."""
    n = int(count)
    if n < 0:
        checks.target_range(target, classes)
    return survivors[:n]


def in_arithmetic_of(x: Tensor, *settings: Tensor) -> tuple[Tensor, ...]:
    """Settings in the dtype that the kernels compute in: float32, or float64 for float64 x."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    return tuple(s if s.dtype == acc else s.to(acc) for s in settings)


def cpu_scalars(*numbers: float) -> tuple[Tensor, ...]:
    """Float32 scalars on the CPU, which serve any device, whatever the default device is. They are
    made only once, which saves 4 us each; nothing may write into them."""
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    if traced or ops.transforms_active():
        return _cpu_scalars.__wrapped__(*numbers)
    return _cpu_scalars(*numbers)


@functools.lru_cache(maxsize=256)
def _cpu_scalars(*numbers: float) -> tuple[Tensor, ...]:
    with torch.inference_mode(False):  # otherwise autograd could not save them in a later call
        return tuple(torch.scalar_tensor(n, dtype=torch.float32, device="cpu") for n in numbers)


def _setting(name: str, value: float | Tensor, logits_dtype: torch.dtype, classes: int, device):
    """A threshold or temperature as the kernels take it: [] or [C] in the arithmetic dtype."""
    dtype = torch.float64 if logits_dtype == torch.float64 else torch.float32
    if not isinstance(value, Tensor):
        # A CPU tensor for every device, like PyTorch's own scalars. It is rounded to float32 first,
        # like the thresholds of ELF, so that both give the same result for float64 logits.
        number = checks.number(name, value)
        return torch.scalar_tensor(number, dtype=torch.float32, device="cpu").to(dtype)
    if value.dim() > 1 or (value.dim() == 1 and (value.shape[0] != classes or name != "threshold")):
        shape = f"[] or [{classes}]" if name == "threshold" else "[]"
        raise ValueError(f"{name}: expected shape {shape}, got {checks.describe(value)}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating tensor, got {checks.describe(value)}")
    # A scalar on the CPU serves any device, as PyTorch's own scalars do.
    if value.dim() == 1 or value.device.type != "cpu":
        checks.same_device(name, value, device)
    return value.float().to(dtype).contiguous()


def _made_gate_settings(threshold, temperature, criterion, logits_dtype, classes, device):
    row = criteria.by_name(criterion)
    # Values are read on the CPU only: reading them from another device would wait for it.
    if not isinstance(threshold, Tensor):
        checks.threshold_values("threshold", checks.number("threshold", threshold), row)
    elif threshold.device.type == "cpu" and not torch.compiler.is_compiling():
        checks.threshold_values("threshold", threshold, row)
    if not isinstance(temperature, Tensor) or (
        temperature.device.type == "cpu" and not torch.compiler.is_compiling()
    ):
        checks.positive("temperature", temperature)
    return (
        _setting("threshold", threshold, logits_dtype, classes, device),
        _setting("temperature", temperature, logits_dtype, classes, device),
        row.code,
    )


@functools.lru_cache(maxsize=256)
def _known_gate_settings(threshold: float, temperature: float, criterion: str, dtype: torch.dtype):
    """Checks numbers and makes tensors of them only once, which saves 3 us per call."""
    with torch.inference_mode(False):  # otherwise autograd could not save them in a later call
        return _made_gate_settings(threshold, temperature, criterion, dtype, 0, None)


def gate_settings(threshold, temperature, criterion, logits_dtype, classes, device):
    """Threshold, temperature and the criterion's code as the kernels take them, checked."""
    if (
        type(threshold) is type(temperature) is float
        and type(criterion) is str
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
    ):
        return _known_gate_settings(threshold, temperature, criterion, logits_dtype)
    return _made_gate_settings(threshold, temperature, criterion, logits_dtype, classes, device)


def class_vectors(logits: Tensor, **vectors: Tensor | None) -> list[Tensor | None]:
    """Per-class settings [C] as the kernels take them: detached, in the arithmetic dtype."""
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    for name, value in vectors.items():
        checks.per_class(name, value, logits.shape[1], logits.device)
    return [None if v is None else v.detach().to(acc).contiguous() for v in vectors.values()]
