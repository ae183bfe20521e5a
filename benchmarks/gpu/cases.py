"""The cases that are timed on a GPU: each operator and its baselines, on one shape.

Every candidate is compared with the reference before it is timed. Inputs are random and differ in
every set of buffers.

The project's candidates run the operator, which does not synchronise, and are named after the
backend that serves them. The candidate "called" is the function of `elf_fast.functional`. It
synchronises, to return exactly the survivors, as the reference ("eager") does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from elf_fast import backend, criteria, functional, ops, reference

from ..baselines import (
    forward_and_backward,
    gate_without_sync,
    head_without_sync,
    loss_without_sync,
)
from .timing import Candidate, Gpu

THRESHOLD = 0.6
#: Shape [N, ...] of the features after a stage, for N = 1.
STAGES = {
    "ResNet-32 stage 1": (16, 32, 32),
    "ResNet-32 stage 2": (32, 16, 16),
    "ResNet-32 stage 3": (64, 8, 8),
    "ResNet-50 layer1": (256, 56, 56),
    "ResNet-50 layer2": (512, 28, 28),
    "ResNet-50 layer3": (1024, 14, 14),
    "ResNet-50 layer4": (2048, 7, 7),
    "ViT-B": (197, 768),
}
#: How far a statistic may be from the float64 reference. A sample whose statistic is this close to
#: the threshold may leave or stay.
EXACT = 1e-5

Call = Callable[[int], Any]


@dataclass
class Case:
    candidates: list[Candidate]
    sets: int
    touched: int  # bytes of a set that a call reads
    about: dict[str, Any] = field(default_factory=dict)


def _backends(bench: Gpu, op: str) -> list[str]:
    """The backends that serve an operator, the default first."""
    if bench.device == "cpu" or op not in backend.CUDA_CPP:
        return ["triton"]
    return sorted(("cuda", "triton"), key=lambda b: b != backend.CUDA_DEFAULT[op][0])


def _below_autograd(op: Any, *args: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _compiled(f: Callable[..., Any], bench: Gpu) -> Callable[..., Any]:
    """f, compiled for one shape. After a second shape torch.compile would compile for any shape."""
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, dynamic=False, backend=bench.compiler)


def _beside(
    bench: Gpu, op: str, size: int, check: Callable[[Call], None], own: Call,
    others: dict[str, Call], suffix: str = "",
) -> Iterator[Candidate]:  # fmt: skip
    """A candidate for `own` on every backend, then the others by name. "called" runs on the default
    backend."""
    backends = _backends(bench, op)
    for b in backends:
        yield Candidate(op, b + suffix, own, check, size, b)
    for name, call in others.items():
        yield Candidate(op, name, call, check, size, backends[0] if name == "called" else None)


def _logits(N: int, C: int, dtype: torch.dtype, device: str) -> Tensor:
    """Logits from flat rows to sharp ones, so that about half of the rows leave."""
    sharpness = torch.linspace(0.1, 8.0, N, device=device)[:, None]
    return (torch.randn(N, C, device=device) * sharpness).to(dtype)


def _settings(bench: Gpu) -> tuple[Tensor, Tensor]:
    """Threshold and temperature, on the device as ELF has them."""
    return torch.tensor(THRESHOLD, device=bench.device), torch.tensor(1.0, device=bench.device)


def _close(name: str, out: Tensor, truth: Tensor, tolerance: float) -> None:
    """Compares the norm of the error with that of the truth. NaN never passes."""
    out, truth = out.double(), truth.double()
    error = float((out - truth).norm() / truth.norm().clamp_min(1e-30))
    assert out.shape == truth.shape and error <= tolerance, f"{name} is off by {error:.2e}"


def _check_gate(out: Any, logits: Tensor, criterion: str, target: Tensor | None = None) -> None:
    """Compares the outputs of a gate with the float64 reference.

    Args:
        out: statistic, prediction, survivors (an operator pads them with N) and, from an operator,
            their count.
    """
    confidence, prediction, survivors, *count = out
    N, z = logits.shape[0], logits.double()
    truth = reference.exit_gate(z, THRESHOLD, criterion=criterion, target=target)
    survivors = survivors[survivors < N]
    assert bool((survivors[1:] > survivors[:-1]).all()), "survivors do not ascend"
    for value in count:
        assert int(value) == survivors.shape[0], f"count is {int(value)}, not {len(survivors)}"
    tie = prediction != truth.prediction
    top = z.amax(dim=1)
    chosen = z.gather(1, prediction.clamp(0, z.shape[1] - 1)[:, None]).squeeze(1)
    # Close logits can have equal probabilities, so either of their classes is right.
    lower = top - chosen > EXACT * top.abs().clamp_min(1.0)
    assert not bool(lower.any()), f"{int(lower.sum())} predictions are wrong"
    goes_on, expected = (torch.zeros(N, dtype=torch.bool, device=z.device) for _ in range(2))
    goes_on[survivors], expected[truth.survivors] = True, True
    near = (truth.confidence - THRESHOLD).abs() <= EXACT
    differ = (goes_on != expected) & ~near & ~tie
    assert not bool(differ.any()), f"{int(differ.sum())} decisions are wrong"
    off = ~((confidence.double() - truth.confidence).abs() <= EXACT)
    assert not bool(off.any()), f"{int(off.sum())} confidences are off"


def gate(
    bench: Gpu, shape: tuple[int, int], dtype: torch.dtype, compiled: bool, criterion: str
) -> Case:
    N, C = shape
    size = N * C * dtype.itemsize
    sets = bench.sets(size)
    x = [_logits(N, C, dtype, bench.device) for _ in range(sets)]
    t, T = _settings(bench)
    code = criteria.TABLE[criterion].code

    def check(call: Call) -> None:
        for i in (0, sets - 1):
            _check_gate(call(i), x[i], criterion)

    others: dict[str, Call] = {
        "called": lambda i: functional.exit_gate(x[i], THRESHOLD, criterion=criterion),
        "eager": lambda i: reference.exit_gate(x[i], THRESHOLD, criterion=criterion),
        "plain": lambda i: gate_without_sync(x[i], THRESHOLD, criterion),
    }
    if compiled:
        f = _compiled(lambda z: gate_without_sync(z, THRESHOLD, criterion), bench)
        others["torch.compile"] = lambda i: f(x[i])

    def own(i: int) -> Any:
        return _below_autograd(ops.exit_gate, x[i], t, T, code, None, False)

    return Case([*_beside(bench, "exit_gate", size, check, own, others)], sets, size)


def _features(bench: Gpu, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    x = torch.randn(shape, device=bench.device, dtype=dtype)
    return x.to(memory_format=torch.channels_last) if layout == "channels_last" else x


@dataclass
class _Compaction:
    """The tensors of a compaction, the calls on them and the checks of these calls."""

    x: list[Tensor]  # a set of features [N, ...] per set of buffers
    out: list[Tensor]
    survivors: Tensor  # [n] on the device

    def __post_init__(self) -> None:
        self.N, self.n = len(self.x[0]), len(self.survivors)
        rest = self.survivors.new_full((self.N - self.n,), self.N)
        self.padded = torch.cat([self.survivors, rest])
        self.count = torch.tensor(self.n, device=self.survivors.device)
        self.grad = [x[: self.n] for x in self.x]

    def compact(self, i: int) -> Tensor:
        return _below_autograd(ops.compact, self.x[i], self.survivors)

    def compact_into(self, i: int) -> Any:
        return _below_autograd(ops.compact_into, self.out[i], self.x[i], self.padded, self.count)

    def compact_(self, i: int) -> Tensor:
        return _below_autograd(ops.compact_, self.x[i], self.padded, self.count)

    def compact_backward(self, i: int) -> Tensor:
        return _below_autograd(ops.compact_backward, self.grad[i], self.survivors, self.N)

    def index_select(self, i: int) -> Tensor:
        return self.x[i].index_select(0, self.survivors)

    def index_select_out(self, i: int) -> Tensor:
        return torch.index_select(self.x[i], 0, self.survivors, out=self.out[i][: self.n])

    def index_copy(self, i: int) -> Tensor:
        return torch.zeros_like(self.x[i]).index_copy_(0, self.survivors, self.grad[i])

    def check(self, call: Call) -> None:
        self._check_new(call, self.x[0][self.survivors])

    def check_backward(self, call: Call) -> None:
        wanted = torch.zeros_like(self.x[0])
        wanted[self.survivors] = self.grad[0]
        self._check_new(call, wanted)

    def _check_new(self, call: Call, wanted: Tensor) -> None:
        """Compares a result in new memory. The NaNs are freed just before the call, so that the
        allocator is likely to give their memory to the result: an element that the kernel does not
        write is then NaN."""
        poison = torch.full_like(wanted, math.nan)
        del poison
        assert torch.equal(call(0), wanted), "rows differ"

    def check_into(self, call: Call) -> None:
        out = self.out[0].fill_(math.nan)
        call(0)
        assert torch.equal(out[: self.n], self.x[0][self.survivors]), "rows differ"
        assert bool(out[self.n :].isnan().all()), "rows past the count were written"

    def check_in_place(self, call: Call) -> None:
        x = self.x[0]
        before = x.clone()
        order = call(0)[: self.n]
        assert torch.equal(order.sort().values, self.survivors), "the order is not the survivors'"
        assert torch.equal(x[: self.n], before[order]), "rows differ"
        assert torch.equal(x[self.n :], before[self.n :]), "rows past the survivors changed"


def compaction(
    bench: Gpu, shape: tuple[int, ...], dtype: torch.dtype, compiled: bool, layout: str,
    share: float, features: str,
) -> Case:  # fmt: skip
    N = shape[0]
    n = round(share * N)
    size = math.prod(shape) * dtype.itemsize
    kept = size // N * n
    # A call with few survivors touches little of a set, so it needs more sets to fill the cache.
    sets = min(bench.sets(max(kept, size // N)), bench.sets(size) * 8)
    x = [_features(bench, shape, dtype, layout) for _ in range(sets)]
    survivors = torch.randperm(N)[:n].sort().values
    moved = 2 * int((survivors >= n).sum()) * (size // N)
    on = _Compaction(x, [torch.empty_like(x[0]) for _ in x], survivors.to(bench.device))
    candidates = [
        *_beside(bench, "compact_into", 2 * kept, on.check_into, on.compact_into,
                 {"index_select(out=)": on.index_select_out}),
        *_beside(bench, "compact_backward", size + kept, on.check_backward, on.compact_backward,
                 {"zeros, index_copy_": on.index_copy}),
        *_beside(bench, "compact_", moved, on.check_in_place, on.compact_, {}),
    ]  # fmt: skip
    if n:  # without survivors compact launches no kernel, and a graph would be empty
        others: dict[str, Call] = {"index_select": on.index_select}
        if compiled:
            f = _compiled(lambda z, rows: z.index_select(0, rows), bench)
            others["torch.compile"] = lambda i: f(x[i], on.survivors)
        candidates += _beside(bench, "compact", 2 * kept, on.check, on.compact, others)
    return Case(candidates, sets, max(kept, size // 8), {"row bytes": size // N})


def head(
    bench: Gpu, shape: tuple[int, ...], dtype: torch.dtype, compiled: bool, layout: str, C: int,
    features: str,
) -> Case:  # fmt: skip
    D = shape[2] if len(shape) == 3 else shape[1]
    size = math.prod(shape) * dtype.itemsize
    sets = bench.sets(size)
    x = [_features(bench, shape, dtype, layout) for _ in range(sets)]
    # Means over many positions are small. Larger weights give logits of the usual size.
    spread = 3.0 * math.sqrt(math.prod(shape[1:]) / D / D)
    weight = (torch.randn(C, D, device=bench.device) * spread).to(dtype)
    bias = torch.randn(C, device=bench.device, dtype=dtype)
    t, T = _settings(bench)
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2

    def own(with_logits: bool) -> Call:
        return lambda i: _below_autograd(
            ops.exit_head, x[i], weight, bias, t, T, 0, None, False, with_logits
        )

    def check(call: Call) -> None:
        """Compares the logits with float64, and the gate with the reference on these logits."""
        logits, *rest = call(0)
        truth = reference.pool(x[0].double()) @ weight.double().T + bias.double()
        _close("logits", logits, truth, tolerance)
        _check_gate(rest[-4:], logits, "confidence")

    def check_without_logits(call: Call) -> None:
        with_logits, without = own(True)(0), call(0)
        assert without[0].shape[0] == 0, "it returned logits"
        for a, b in zip(with_logits[1:], without[1:], strict=True):
            close = torch.allclose(a, b, rtol=EXACT, atol=EXACT)
            assert close, "it differs from the result with logits"

    others: dict[str, Call] = {
        "called": lambda i: functional.exit_head(x[i], weight, bias, THRESHOLD),
        "eager": lambda i: reference.exit_head(x[i], weight, bias, THRESHOLD),
        "plain": lambda i: head_without_sync(x[i], weight, bias, THRESHOLD),
    }
    if compiled:
        f = _compiled(lambda z: head_without_sync(z, weight, bias, THRESHOLD), bench)
        others["torch.compile"] = lambda i: f(x[i])
    # The bytes do not count the weights: the target is about reading the features.
    candidates = [
        *_beside(bench, "exit_head", size, check_without_logits, own(False), {}),
        *_beside(bench, "exit_head", size, check, own(True), others, ", with logits"),
    ]
    return Case(candidates, sets, size)


def _family(name: str, C: int, device: str) -> dict[str, Any]:
    if name == "cross-entropy":
        return {}
    vectors = {"weight": (0.2, 3.0), "margins": (0.5, 0.1), "bias": (2.0, -1.0)}
    return {k: torch.linspace(*v, C, device=device) for k, v in vectors.items()} | {
        "gamma": 1.5, "scale": 2.0, "label_smoothing": 0.1,
    }  # fmt: skip


def loss(
    bench: Gpu, shape: tuple[int, int], dtype: torch.dtype, compiled: bool, member: str
) -> Case:
    """Forward and backward."""
    N, C = shape
    size = N * C * dtype.itemsize
    sets = bench.sets(size)
    x = [_logits(N, C, dtype, bench.device) for _ in range(sets)]
    leaves = [z.detach().requires_grad_() for z in x]
    y = torch.randint(0, C, (N,), device=bench.device)
    y[::2] = x[0][::2].argmax(dim=1)
    grad = torch.rand(N, device=bench.device) + 0.5
    t, T = _settings(bench)
    family = _family(member, C, bench.device)
    vectors = [family.get(k) for k in ("weight", "margins", "bias")]
    scalars = [family.get("gamma", 0.0), family.get("scale", 1.0),
               family.get("label_smoothing", 0.0)]  # fmt: skip

    def own(i: int) -> Any:
        out = _below_autograd(ops.exit_loss, x[i], y, *vectors, *scalars, t, T, 0)
        grad_logits = _below_autograd(
            ops.exit_loss_backward, grad, x[i], y, out[1], *vectors, *scalars
        )
        return out[0], grad_logits, *out[2:]

    def through(f: Callable[..., Any], **settings: Any) -> Call:
        return lambda i: forward_and_backward(
            lambda z, target: f(z, target, **settings, **family), leaves[i], y, grad
        )

    def plain(z: Tensor, target: Tensor) -> Any:
        return loss_without_sync(z, target, THRESHOLD, **family)

    def check(call: Call) -> None:
        value, grad_logits, *gate = call(0)
        truth = x[0].double().requires_grad_()
        doubles = {k: v.double() if isinstance(v, Tensor) else v for k, v in family.items()}
        expected, expected_grad, *_ = forward_and_backward(
            lambda z, target: reference.exit_loss(z, target, **doubles), truth, y, grad.double()
        )
        _close("loss", value, expected, 1e-4)
        _close("gradient", grad_logits, expected_grad, 1e-4 if dtype == torch.float32 else 1e-2)
        _check_gate(gate, x[0], "confidence", target=y)

    others = {
        "called": through(functional.exit_loss, threshold=THRESHOLD),
        "eager": through(reference.exit_loss, threshold=THRESHOLD),
        "plain": lambda i: forward_and_backward(plain, leaves[i], y, grad),
    }
    if compiled:
        f = _compiled(plain, bench)
        others["torch.compile"] = lambda i: forward_and_backward(f, leaves[i], y, grad)
    # At least the logits are read once and their gradient is written once.
    return Case([*_beside(bench, "exit_loss", 2 * size, check, own, others)], sets, size)
