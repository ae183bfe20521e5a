"""Floating-point operations of an ELF, exit by exit, heads included.

As in torch.utils.flop_counter, products count: of matrices, convolutions, attention, recurrent
layers. Elementwise operations, reductions, normalisation, pooling and whatever moves or compares
data do not. The result does not depend on the kernel that serves: fused attention counts what its
two matrix products count.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

from . import checks
from .base import ELFBase
from .modes import mode

__all__ = ["Flops", "count_flops"]


class Flops(NamedTuple):
    """Floating-point operations for one sample (a multiplication and an addition are two)."""

    stages: tuple[int, ...]  # [E]
    heads: tuple[int, ...]  # [E]

    @property
    def without_exits(self) -> int:
        """All stages and the last head: the network without exits."""
        return sum(self.stages) + self.heads[-1]

    def leaving_at(self, e: int) -> int:
        """FLOPs of a sample that leaves at exit e (0-based): all stages and heads up to there."""
        return sum(self.stages[: e + 1]) + sum(self.heads[: e + 1])

    def mean(self, exit_counts: Sequence[int]) -> float:
        """Mean FLOPs per sample if exit_counts [E] samples left at each exit."""
        total = sum(n * self.leaving_at(e) for e, n in enumerate(exit_counts))
        return total / sum(exit_counts)


@torch.no_grad()  # inference mode would make tensors in a module's cache useless for training
def count_flops(model: ELFBase, sample: Tensor) -> Flops:
    """FLOPs of every stage and head, by torch.utils.flop_counter on one sample [1, ...]. If a
    BatchNorm has no running statistics, two copies of it run, and half of their FLOPs count.

    Operators that compute products and have no formula, and all operators from outside PyTorch
    without one, count as 0 and are named in a warning. `torch.utils.flop_counter` has
    `register_flop_formula` for them.

    Raises:
        TypeError: `sample` is no tensor. ValueError: it does not hold exactly one sample.
    """
    checks.tensor("sample", sample)
    if sample.dim() < 1 or len(sample) != 1:
        raise ValueError(f"sample: expected one sample [1, ...], got {checks.describe(sample)}")
    unknown: set[str] = set()

    def measure(module: nn.Module, x: Tensor) -> tuple[int, Tensor]:
        with _Counter() as counter:
            y = module(x)
        unknown.update(counter.unknown)
        return counter.get_total_flops() // copies, y

    norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
    copies = 2 if any(norm.running_mean is None for norm in norms) else 1
    stages, heads = [], []
    x = torch.cat([sample] * copies)  # a stage may write into its input
    with mode(model, training=False), _without_fast_path():
        for stage, head in zip(model.stages, model.heads, strict=True):
            flops, x = measure(stage, x)
            stages.append(flops)
            heads.append(measure(head, x)[0])
    if unknown:
        warnings.warn(
            f"count_flops: no formula for {', '.join(sorted(unknown))}, which counts as 0; "
            "torch.utils.flop_counter.register_flop_formula takes one",
            stacklevel=3,
        )
    return Flops(tuple(stages), tuple(heads))


class _Counter(FlopCounterMode):
    """Counts, and notes the names of operators that compute and have no formula."""

    def __init__(self) -> None:
        ours = {operator: f for operator, f in _FORMULAS.items() if operator not in flop_registry}
        super().__init__(display=False, custom_mapping=ours)
        self.unknown: set[str] = set()

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        if func_packet not in self.flop_registry and _computes(func_packet):
            self.unknown.add(str(func_packet))
        return super()._count_flops(func_packet, out, args, kwargs)


@contextlib.contextmanager
def _without_fast_path() -> Iterator[None]:
    """torch.nn's transformer layers as the operators that they consist of."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


#: Namespaces of operators that move data or ask for properties.
_SILENT = ("prim", "prims", "profiler", "c10d", "_c10d_functional")
#: PyTorch's operators that compute products, by words in their names.
_PRODUCTS = re.compile(
    r"(mm|mv|dot)(_|$)|matmul|conv(?!ert)|rnn|lstm|gru|attention|fft_[cr]|linalg|cholesky|solve|svd"
    r"|qrf|ormqr|cdist|pdist|euclidean|^_trilinear|linear$|encoder_layer"
)
#: Those of them that do not: norms, checks, the gates of a cell, a change of a weight's layout.
_NO_PRODUCTS = re.compile(r"linalg_(vector_norm|_powsum|cross|check)|_thnn_fused|_weight$")


def _computes(operator: Any) -> bool:
    """Whether FLOPs are missing if the operator has no formula."""
    namespace, _, name = getattr(operator, "_qualified_op_name", "").partition("::")
    if namespace != "aten":
        return namespace not in _SILENT
    return bool(_PRODUCTS.search(name)) and not _NO_PRODUCTS.search(name)


# Formulas take shapes in place of tensors.


def _vectors(*shapes: Any, out_shape: Any = None, **options: Any) -> int:
    """A matrix [M, K] times a vector [K], or a scalar product: two for every entry of the largest
    argument."""
    return 2 * max(prod(shape) for shape in shapes if isinstance(shape, Sequence))


def _product(a: Any, b: Any, *args: Any, out_shape: Any = None, **options: Any) -> int:
    """[M, K] times [K, N]."""
    return 2 * prod(a) * b[-1]


def _added_product(added: Any, a: Any, b: Any, *args: Any, **options: Any) -> int:
    return _product(a, b)


def _attention(query: Any, key: Any, value: Any, *args: Any, **options: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _recurrent(x: Any, matrices: Any) -> int:
    """Every step [..., D] of x is multiplied with every matrix."""
    return 2 * prod(x[:-1]) * sum(prod(w) for w in matrices if len(w) == 2)


def _recurrent_layer(x: Any, w_ih: Any, w_hh: Any, *args: Any, **options: Any) -> int:
    return _recurrent(x, (w_ih, w_hh))


def _recurrent_layers(x: Any, weights: Any, *args: Any, **options: Any) -> int:
    return _recurrent(x, weights)


def _recurrent_layers_of_mps(x: Any, state: Any, weights: Any, *args: Any, **options: Any) -> int:
    return _recurrent(x, weights)


def _formulas() -> dict[Any, Callable[..., int]]:
    named = {
        "_scaled_dot_product_flash_attention_for_cpu": _attention,
        "_scaled_dot_product_fused_attention_overrideable": _attention,
        "_scaled_dot_product_attention_math_for_mps": _attention,
        "mkldnn_rnn_layer": _recurrent_layer,
        "_cudnn_rnn": _recurrent_layers,
        "miopen_rnn": _recurrent_layers,
        "_lstm_mps": _recurrent_layers_of_mps,
        "mv": _vectors,
        "addmv": _vectors,
        "dot": _vectors,
        "vdot": _vectors,
        "_int_mm": _product,
        "_addmm_activation": _added_product,
        "addbmm": _added_product,
    }
    return {getattr(torch.ops.aten, name): f for name, f in named.items()}


_FORMULAS = _formulas()
