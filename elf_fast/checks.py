"""Argument checks shared by the reference and the kernels. Every message names the argument, what
was expected and what was given."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .criteria import Criterion

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def describe(value: Any) -> str:
    """A short description of an argument, for error messages."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    shown = " ".join(repr(value).split())
    if len(shown) > 100:
        shown = f"{shown[:97]}..."
    return f"{shown} ({type(value).__name__})"


def printable(text: str) -> str:
    """The text with line ends, control characters and what UTF-8 cannot hold spelled out."""
    unclear = {"Cc", "Cs", "Zl", "Zp"}  # control characters, surrogates, line ends
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in unclear else c
        for c in text
    )


def tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {describe(value)}")


def logits(value: Any) -> None:
    """`value` must be floating [N, C] with C >= 1."""
    tensor("logits", value)
    if value.dtype not in _FLOATING:
        raise TypeError(
            f"logits: expected float32, float64, bfloat16 or float16, got {describe(value)}"
        )
    if value.dim() != 2 or value.shape[1] < 1:
        raise ValueError(f"logits: expected shape [N, C] with C >= 1, got {describe(value)}")


def example_input(value: Any) -> None:
    """`value` must be [N, ...] with N >= 1."""
    tensor("example_input", value)
    if value.dim() < 1 or len(value) < 1:
        raise ValueError(
            f"example_input: expected a batch [N, ...] with N >= 1, got {describe(value)}"
        )


def features(value: Any) -> None:
    """`value` must be [N, ...]."""
    tensor("features", value)
    if value.dim() < 1:
        raise ValueError(f"features: expected shape [N, ...], got {describe(value)}")


def samples_are_dense(x: Tensor) -> bool:
    """Whether the dimensions 1.. of x, in some order, fill one block of memory without gaps."""
    if 0 in x.shape[1:]:
        return True
    inner = sorted((st, sz) for st, sz in zip(x.stride()[1:], x.shape[1:], strict=True) if sz != 1)
    expected = 1
    for stride, size in inner:
        if stride != expected:
            return False
        expected = expected * size
    return True


def movable(value: Tensor) -> None:
    """Each sample of `value` must be one block of memory that overlaps no other sample."""
    apart = value.shape[0] <= 1 or value.stride(0) >= value.shape[1:].numel()
    if not (apart and samples_are_dense(value)):
        raise ValueError(
            "features: expected every sample dense in memory and no two overlapping, got "
            f"{describe(value)} with strides {list(value.stride())}"
        )


def batch_like(name: str, value: Any, batch: Tensor, rows: int) -> None:
    """`value` must hold at least `rows` samples of the batch's shape, dtype and memory format."""
    tensor(name, value)
    same = value.dtype == batch.dtype and value.shape[1:] == batch.shape[1:]
    if not same or value.shape[0] < rows or value.stride()[1:] != batch.stride()[1:]:
        raise ValueError(
            f"{name}: expected at least {rows} samples like {describe(batch)} with strides "
            f"{list(batch.stride())}, got {describe(value)} with strides {list(value.stride())}"
        )
    same_device(name, value, batch.device)


def poolable(value: Any) -> None:
    """`value` must be floating [N, D], [N, T, D] or [N, D, H, W], and only N may be 0."""
    tensor("features", value)
    if value.dtype not in _FLOATING:
        raise TypeError(
            f"features: expected float32, float64, bfloat16 or float16, got {describe(value)}"
        )
    if value.dim() not in (2, 3, 4) or 0 in value.shape[1:]:
        raise ValueError(
            "features: expected shape [N, D], [N, T, D] or [N, D, H, W] with no empty dimension "
            f"after the first, got {describe(value)}"
        )


def classifier(weight: Any, bias: Any, channels: int) -> None:
    """weight [C, D] with D = channels, bias None or [C]."""
    tensor("weight", weight)
    if weight.dim() != 2 or weight.shape[1] != channels or weight.shape[0] < 1:
        raise ValueError(
            f"weight: expected shape [C, {channels}] to match the features, got {describe(weight)}"
        )
    if bias is not None:
        tensor("bias", bias)
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            raise ValueError(f"bias: expected shape [{weight.shape[0]}], got {describe(bias)}")


def target_shape(value: Any, rows: int, device: torch.device) -> None:
    """`value` must be int64 [N] on `device`."""
    tensor("target", value)
    if value.dtype != torch.int64:
        raise TypeError(f"target: expected int64 class indices, got {describe(value)}")
    if value.dim() != 1 or value.shape[0] != rows:
        raise ValueError(f"target: expected shape [{rows}], one per sample, got {describe(value)}")
    same_device("target", value, device)


def target_range(value: Tensor | None, classes: int) -> None:
    """`value` must be None or hold 0 <= target < C. Reads the values, which synchronises with the
    device that holds them."""
    if value is not None and value.numel():
        low, high = (int(v) for v in torch.aminmax(value))
        if low < 0 or high >= classes:
            raise ValueError(
                f"target: expected 0 <= target < {classes} (the classes of the logits), "
                f"got values from {low} to {high}"
            )


def same_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")


def threshold_values(name: str, value: Any, criterion: Criterion) -> None:
    """Thresholds must lie in the criterion's range or equal `criterion.off` (exit switched off)."""
    numbers = value.detach().flatten().tolist() if isinstance(value, Tensor) else [value]
    for number in numbers:
        in_range = criterion.low <= number <= criterion.high and math.isfinite(number)
        if not (in_range or number == criterion.off):
            wanted = (
                f"values in [{criterion.low:g}, {criterion.high:g}]"
                if criterion.is_bounded
                else "finite values"
            )
            raise ValueError(
                f"{name}: expected {wanted}, or {criterion.off} to switch an exit off "
                f"(criterion {criterion.name!r}), got {number}"
            )


def number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    return float(value)


def integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {describe(value)}")
    if value < low or (high is not None and value > high):
        bound = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name}: expected an integer {bound}, got {value}")


def positive(name: str, value: Any) -> None:
    values = (
        value.detach().flatten().tolist() if isinstance(value, Tensor) else [number(name, value)]
    )
    for v in values:
        if not (v > 0 and math.isfinite(v)):
            raise ValueError(f"{name}: expected positive finite numbers, got {v}")


def at_least(name: str, value: Any, low: float, high: float = math.inf) -> None:
    v = number(name, value)
    if not (low <= v <= high) or math.isinf(v):
        bound = f"a finite number >= {low}" if math.isinf(high) else f"a number in [{low}, {high}]"
        raise ValueError(f"{name}: expected {bound}, got {v}")


def device(name: str | None) -> torch.device:
    """The device called `name`, which torch must be able to use; for None a GPU if there is one,
    else the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError:
        raise ValueError(
            f"device: expected cpu, cuda or another device of torch, got {name!r}"
        ) from None
    if found.type == "cpu":
        return torch.device("cpu")  # tensors on cpu:1 say that they are on cpu
    if found.type == "cuda":
        gpus = torch.cuda.device_count()
        if (found.index or 0) >= gpus:
            raise ValueError(
                f"device: expected cpu, or one of the {gpus} GPUs that torch can use, got {name!r}"
            )
        return found
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if here is None or here.type != found.type:
        raise ValueError(
            f"device: expected cpu or {here.type if here else 'a device'} that torch can use here, "
            f"got {name!r}"
        )
    return found


def per_class(name: str, value: Any, classes: int, device: torch.device) -> None:
    """`value` must be None or floating [C] on `device`."""
    if value is None:
        return
    tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating tensor, got {describe(value)}")
    if value.dim() != 1 or value.shape[0] != classes:
        raise ValueError(
            f"{name}: expected shape [{classes}], one per class, got {describe(value)}"
        )
    same_device(name, value, device)


def device_for(value: Any) -> torch.device:
    """Where a user's numbers become a tensor: on torch's default device, or on the CPU if that is
    the meta device, which holds no values. A tensor stays where it is; without an explicit device,
    torch.as_tensor would move it to the default device."""
    if isinstance(value, Tensor):
        return value.device
    device = torch.get_default_device()
    return torch.device("cpu") if device.type == "meta" else device


def class_counts(value: Any, least: int = 1) -> Tensor:
    """[C] float64: the training samples of every class."""
    counts = torch.as_tensor(value, dtype=torch.float64, device=device_for(value))
    if counts.is_meta:
        raise ValueError("class_counts: expected values, got a tensor on the meta device")
    valid = (counts >= least) & counts.isfinite()
    if counts.dim() != 1 or counts.numel() == 0 or not bool(valid.all()):
        raise ValueError(
            f"class_counts: expected [C] finite training counts of at least {least}, "
            f"got {describe(value)}"
        )
    return counts


def survivors_shape(value: Any, rows: int, device: torch.device) -> None:
    """`value` must be int64 [n] on `device`, n <= rows."""
    tensor("survivors", value)
    if value.dtype != torch.int64:
        raise TypeError(f"survivors: expected int64 indices, got {describe(value)}")
    if value.dim() != 1 or value.shape[0] > rows:
        raise ValueError(
            f"survivors: expected shape [n] with n <= {rows} samples, got {describe(value)}"
        )
    same_device("survivors", value, device)


def survivors_values(value: Tensor, rows: int) -> None:
    """`value` must be ascending indices in [0, rows). Reads the values, on the CPU only."""
    _ascending("survivors", value, rows)


def places(rows: Tensor | None, n: int, batch: int) -> None:
    """`rows` must be n ascending indices in [0, batch), or None for n <= batch."""
    if rows is None:
        if n > batch:
            raise ValueError(f"out_logits: expected at least {n} rows, got {batch}")
        return
    if rows.dtype != torch.int64 or rows.shape != (n,):
        raise ValueError(f"rows: expected int64 [{n}], got {describe(rows)}")
    _ascending("rows", rows, batch)


def _ascending(name: str, value: Tensor, rows: int) -> None:
    if value.device.type == "cpu" and value.shape[0]:
        low, high = int(value[0]), int(value[-1])
        if low < 0 or high >= rows or not bool((value[1:] > value[:-1]).all()):
            raise ValueError(
                f"{name}: expected ascending indices in [0, {rows}), got {value.tolist()[:8]}"
                + ("..." if value.shape[0] > 8 else "")
            )


def sequence_of_modules(name: str, value: Any) -> list[torch.nn.Module]:
    if isinstance(value, torch.nn.Module) and not isinstance(
        value, (torch.nn.ModuleList, torch.nn.Sequential)
    ):
        raise TypeError(f"{name}: expected a list of modules, got one {type(value).__name__}")
    if not isinstance(value, (Sequence, torch.nn.ModuleList, torch.nn.Sequential)):
        raise TypeError(f"{name}: expected a list of modules, got {describe(value)}")
    modules = list(value)
    for i, module in enumerate(modules):
        if not isinstance(module, torch.nn.Module):
            raise TypeError(f"{name}[{i}]: expected an nn.Module, got {describe(module)}")
    return modules
