"""What `gpu.py` times: each operator beside what a user would run instead, every candidate checked
against the reference before it is timed. Inputs are random and differ in every set of buffers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from baselines import (
    forward_and_backward,
    gate_without_waiting,
    head_without_waiting,
    loss_without_waiting,
)
from gpu_timing import Candidate, Gpu
from torch import Tensor

from elf_fast import backend, ops, reference

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
#: How far a statistic may be from the truth, and how near the threshold a decision may differ.
EXACT = 1e-5


@dataclass
class Case:
    candidates: list[Candidate]
    sets: int
    size: int  # bytes of a set's input
    about: dict[str, Any] = field(default_factory=dict)


def _backends(bench: Gpu, op: str) -> list[str]:
    has_cpp = bench.device == "cuda" and op in backend.CUDA_CPP
    return ["cuda", "triton"] if has_cpp else ["triton"]


def _below_autograd(op: Any, *args: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _compiled(f: Callable[..., Any], bench: Gpu) -> Callable[..., Any]:
    """Compiled for one shape: a shape seen earlier would make torch.compile guess at others."""
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, dynamic=False, backend=bench.compiler)


def _logits(N: int, C: int, dtype: torch.dtype, device: str) -> Tensor:
    """Rows of every sharpness, so that about half of them leave."""
    sharpness = torch.linspace(0.1, 8.0, N, device=device)[:, None]
    return (torch.randn(N, C, device=device) * sharpness).to(dtype)


def _close(name: str, out: Tensor, truth: Tensor, tolerance: float) -> None:
    """By norm; NaN never passes."""
    out, truth = out.double(), truth.double()
    error = float((out - truth).norm() / truth.norm().clamp_min(1e-30))
    assert out.shape == truth.shape and error <= tolerance, f"{name} is off by {error:.2e}"


def _check_gate(out: Any, logits: Tensor, criterion: str, target: Tensor | None = None,
                tolerance: float = EXACT, early_stop: bool = False) -> None:  # fmt: skip
    """confidence, prediction, survivors padded with N and, where it is given, their count."""
    confidence, prediction, survivors, *count = out
    N = logits.shape[0]
    z = logits.double()
    truth = reference.exit_gate(z, THRESHOLD, criterion=criterion, target=target)
    survivors = survivors[survivors < N]
    assert bool((survivors[1:] > survivors[:-1]).all()), "survivors do not ascend"
    for value in count:
        assert int(value) == survivors.shape[0], f"count is {int(value)}, not {len(survivors)}"
    top = z.amax(dim=1)
    chosen = z.gather(1, prediction.clamp(0, z.shape[1] - 1)[:, None]).squeeze(1)
    lower = (top - chosen) > max(tolerance, 1e-6) * top.abs().clamp_min(1.0)
    assert not bool(lower.any()), f"{int(lower.sum())} predictions are wrong"
    goes_on, expected = (torch.zeros(N, dtype=torch.bool, device=z.device) for _ in range(2))
    goes_on[survivors], expected[truth.survivors] = True, True
    tie = prediction != truth.prediction
    near = (truth.confidence - THRESHOLD).abs() <= tolerance
    differ = (goes_on != expected) & ~near & ~tie
    assert not bool(differ.any()), f"{int(differ.sum())} decisions are wrong"
    off = ~((confidence.double() - truth.confidence).abs() <= tolerance)
    if early_stop:
        off &= ~goes_on
    assert not bool(off.any()), f"{int(off.sum())} confidences are off"


def gate(
    bench: Gpu, shape: tuple[int, int], dtype: torch.dtype, criterion: str, compiled: bool
) -> Case:
    N, C = bench.shrink(shape)
    size = N * C * dtype.itemsize
    sets = bench.sets(size)
    x = [_logits(N, C, dtype, bench.device) for _ in range(sets)]
    t, T = (torch.tensor(v, device=bench.device) for v in (THRESHOLD, 1.0))
    code = reference.CRITERIA.index(criterion)

    def op(early_stop: bool) -> Callable[[int], Any]:
        return lambda i: _below_autograd(ops.exit_gate, x[i], t, T, code, None, early_stop)

    def check(call: Callable[[int], Any], early_stop: bool = False) -> None:
        for i in (0, sets - 1):
            _check_gate(call(i), x[i], criterion, early_stop=early_stop)

    candidates = []
    for b in _backends(bench, "exit_gate"):
        candidates.append(Candidate("exit_gate", b, op(False), check, size, b))
    candidates.append(
        Candidate("exit_gate", "eager",
                  lambda i: reference.exit_gate(x[i], THRESHOLD, criterion=criterion), check, size)
    )  # fmt: skip
    candidates.append(
        Candidate("exit_gate", "plain",
                  lambda i: gate_without_waiting(x[i], THRESHOLD, criterion), check, size)
    )  # fmt: skip
    if compiled:
        b = _backends(bench, "exit_gate")[0]
        candidates.append(
            Candidate("exit_gate", f"{b}, early stop", op(True), lambda call: check(call, True),
                      size, b)
        )  # fmt: skip
        f = _compiled(lambda z: gate_without_waiting(z, THRESHOLD, criterion), bench)
        candidates.append(Candidate("exit_gate", "torch.compile", lambda i: f(x[i]), check, size))
    return Case(candidates, sets, size)


def _features(bench: Gpu, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    x = torch.randn(shape, device=bench.device, dtype=dtype)
    return x.to(memory_format=torch.channels_last) if layout == "channels_last" else x


def _equal(call: Callable[[int], Any], expected: Callable[[], Tensor], i: int = 0) -> None:
    """call(i) gives exactly the expected; the memory it is likely to get holds NaN before."""
    wanted = expected()
    poison = torch.full_like(wanted, math.nan)
    del poison
    out = call(i)
    assert torch.equal(out, wanted), "rows differ"


def compaction(
    bench: Gpu, shape: tuple[int, ...], dtype: torch.dtype, layout: str, share: float
) -> Case:
    shape = bench.shrink(shape)
    N = shape[0]
    n = max(1, round(share * N))
    size = math.prod(shape) * dtype.itemsize
    sets = bench.sets(size)
    x = [_features(bench, shape, dtype, layout) for _ in range(sets)]
    survivors = torch.randperm(N)[:n].sort().values
    moved = 2 * int((survivors >= n).sum()) * (size // N)
    survivors = survivors.to(bench.device)
    padded = torch.cat([survivors, survivors.new_full((N - n,), N)])
    count = torch.tensor(n, device=bench.device)
    out = [torch.empty_like(x[0]) for _ in range(sets)]
    grad = [x[i][:n] for i in range(sets)]

    def into(call: Callable[[int], Any]) -> Callable[[int], Any]:
        def filled(i: int) -> Tensor:
            out[i].fill_(math.nan)
            call(i)
            if n < N:
                assert bool(out[i][n:].isnan().all()), "rows past the count were written"
            return out[i][:n]

        return filled

    def select_into(i: int) -> Tensor:
        return torch.index_select(x[i], 0, survivors, out=out[i][:n])

    def plain_backward(i: int) -> Tensor:
        return torch.zeros_like(x[i]).index_copy_(0, survivors, grad[i])

    def check_in_place(call: Callable[[int], Any]) -> None:
        before = x[0].clone()
        order = call(0)[:n]
        assert torch.equal(order.sort().values, survivors), "order does not name the survivors"
        assert torch.equal(x[0][:n], before[order]), "rows differ"
        assert torch.equal(x[0][n:], before[n:]), "rows past the survivors changed"

    def gathered() -> Tensor:
        return x[0][survivors]

    def scattered() -> Tensor:
        wanted = torch.zeros_like(x[0])
        wanted[survivors] = grad[0]
        return wanted

    def check(call: Callable[[int], Any]) -> None:
        _equal(call, gathered)

    def check_into(call: Callable[[int], Any]) -> None:
        _equal(into(call), gathered)

    def check_backward(call: Callable[[int], Any]) -> None:
        _equal(call, scattered)

    F, sF = size, size // N * n
    calls: list[tuple[str, Callable[[int], Any], Any, int]] = [
        ("compact", lambda i: _below_autograd(ops.compact, x[i], survivors), check, 2 * sF),
        ("compact_into", lambda i: _below_autograd(ops.compact_into, out[i], x[i], padded, count),
         check_into, 2 * sF),
        ("compact_backward",
         lambda i: _below_autograd(ops.compact_backward, grad[i], survivors, N), check_backward,
         F + sF),
        ("compact_", lambda i: _below_autograd(ops.compact_, x[i], padded, count), check_in_place,
         moved),
    ]  # fmt: skip
    candidates = [
        Candidate("compact", "index_select", lambda i: x[i].index_select(0, survivors), check,
                  2 * sF),
        Candidate("compact_into", "index_select(out=)", select_into, check_into, 2 * sF),
        Candidate("compact_backward", "zeros, index_copy_", plain_backward, check_backward, F + sF),
    ]  # fmt: skip
    for op, call, checked, moves in calls:
        for b in _backends(bench, op):
            candidates.append(Candidate(op, b, call, checked, moves, b))
    return Case(candidates, sets, size, {"row bytes": size // N, "survivors": n})


def head(
    bench: Gpu, shape: tuple[int, ...], dtype: torch.dtype, layout: str, C: int, compiled: bool
) -> Case:
    shape = bench.shrink(shape)
    D = shape[2] if len(shape) == 3 else shape[1]
    size = math.prod(shape) * dtype.itemsize
    sets = bench.sets(size)
    x = [_features(bench, shape, dtype, layout) for _ in range(sets)]
    # Means of many positions are small; the sharpness of the logits should not be.
    spread = 3.0 * math.sqrt(math.prod(shape[1:]) / D / D)
    weight = (torch.randn(C, D, device=bench.device) * spread).to(dtype)
    bias = torch.randn(C, device=bench.device, dtype=dtype)
    t, T = (torch.tensor(v, device=bench.device) for v in (THRESHOLD, 1.0))
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2

    def op(with_logits: bool) -> Callable[[int], Any]:
        def call(i: int) -> Any:
            return _below_autograd(
                ops.exit_head, x[i], weight, bias, t, T, 0, None, False, with_logits
            )

        return call

    def check(call: Callable[[int], Any]) -> None:
        """Logits against float64, then the gate against the candidate's own logits."""
        logits, *rest = call(0)
        truth = reference.pool(x[0].double()) @ weight.double().T + bias.double()
        _close("logits", logits, truth, tolerance)
        _check_gate(rest[-4:] if len(rest) > 3 else rest, logits, "confidence")

    def check_without_logits(call: Callable[[int], Any]) -> None:
        with_logits, without = op(True)(0), call(0)
        assert without[0].shape[0] == 0, "it gave logits unasked"
        for a, b in zip(with_logits[1:], without[1:], strict=True):
            close = torch.allclose(a, b, rtol=EXACT, atol=EXACT)
            assert close, "it differs from the result with logits"

    candidates = []
    for b in _backends(bench, "exit_head"):
        candidates += [
            Candidate("exit_head", b, op(False), check_without_logits, size, b),
            Candidate("exit_head", f"{b}, with logits", op(True), check, size, b),
        ]
    candidates += [
        Candidate("exit_head", "eager",
                  lambda i: reference.exit_head(x[i], weight, bias, THRESHOLD), check, size),
        Candidate("exit_head", "plain",
                  lambda i: head_without_waiting(x[i], weight, bias, THRESHOLD), check, size),
    ]  # fmt: skip
    if compiled:
        f = _compiled(lambda z: head_without_waiting(z, weight, bias, THRESHOLD), bench)
        candidates.append(Candidate("exit_head", "torch.compile", lambda i: f(x[i]), check, size))
    return Case(candidates, sets, size)


def _family(name: str, C: int, device: str) -> dict[str, Any]:
    if name == "cross-entropy":
        return {}
    vectors = {"weight": (0.2, 3.0), "margins": (0.5, 0.1), "bias": (2.0, -1.0)}
    return {k: torch.linspace(*v, C, device=device) for k, v in vectors.items()} | {
        "gamma": 1.5, "scale": 2.0, "label_smoothing": 0.1,
    }  # fmt: skip


def loss(
    bench: Gpu, shape: tuple[int, int], dtype: torch.dtype, member: str, compiled: bool
) -> Case:
    N, C = bench.shrink(shape)
    size = N * C * dtype.itemsize
    sets = bench.sets(size)
    x = [_logits(N, C, dtype, bench.device) for _ in range(sets)]
    leaves = [z.detach().requires_grad_() for z in x]
    y = torch.randint(0, C, (N,), device=bench.device)
    y[::2] = x[0][::2].argmax(dim=1)
    grad = torch.rand(N, device=bench.device) + 0.5
    t, T = (torch.tensor(v, device=bench.device) for v in (THRESHOLD, 1.0))
    family = _family(member, C, bench.device)
    vectors = [family.get(k) for k in ("weight", "margins", "bias")]
    scalars = [family.get("gamma", 0.0), family.get("scale", 1.0),
               family.get("label_smoothing", 0.0)]  # fmt: skip

    def op(i: int) -> Any:
        out = _below_autograd(ops.exit_loss, x[i], y, *vectors, *scalars, t, T, 0)
        grad_logits = _below_autograd(
            ops.exit_loss_backward, grad, x[i], y, out[1], *vectors, *scalars
        )
        return out[0], grad_logits, *out[2:]

    def eager(i: int) -> Any:
        def run(z: Tensor, target: Tensor) -> Any:
            return reference.exit_loss(z, target, threshold=THRESHOLD, **family)

        return forward_and_backward(run, leaves[i], y, grad)

    def plain(z: Tensor, target: Tensor) -> Any:
        return loss_without_waiting(z, target, THRESHOLD, **family)

    def check(call: Callable[[int], Any]) -> None:
        value, grad_logits, *gate = call(0)
        truth = x[0].double().requires_grad_()
        doubles = {k: v.double() if isinstance(v, Tensor) else v for k, v in family.items()}
        expected, expected_grad, *_ = forward_and_backward(
            lambda z, target: reference.exit_loss(z, target, **doubles), truth, y, grad.double()
        )
        _close("loss", value, expected, 1e-4)
        _close("gradient", grad_logits, expected_grad, 1e-4 if dtype == torch.float32 else 1e-2)
        _check_gate(gate, x[0], "confidence", target=y)

    # The logits are read forward and backward, the gradient written.
    least = 3 * size
    candidates = [Candidate("exit_loss", b, op, check, least, b)
                  for b in _backends(bench, "exit_loss")]  # fmt: skip
    candidates += [
        Candidate("exit_loss", "eager", eager, check, least),
        Candidate("exit_loss", "plain",
                  lambda i: forward_and_backward(plain, leaves[i], y, grad), check, least),
    ]  # fmt: skip
    if compiled:
        f = _compiled(plain, bench)
        candidates.append(
            Candidate("exit_loss", "torch.compile",
                      lambda i: forward_and_backward(f, leaves[i], y, grad), check, least)
        )  # fmt: skip
    return Case(candidates, sets, size)
