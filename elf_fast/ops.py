"""The operators `torch.ops.elf_fast.*`: schema, reference kernel, fake (meta) and autograd of each.

Native kernels register themselves for their device (`csrc/`, loaded by `backend.py`); where there
is none, the plain PyTorch of `reference.py` serves. Call these through `elf_fast.functional`, which
checks its arguments; the operators check only what memory safety needs.

Conventions: `threshold` is [] or [C] and `temperature` [], in the arithmetic dtype of the logits
(float32, float64 for float64); `criterion` is a code of `criteria.TABLE`. Survivors are padded:
[N], of which the first `count` [] are survivors and the rest hold N, so every shape is known
without synchronising. With `early_stop` the confidence of a sample that goes on may be NaN, because
it was not computed, and it has no gradient. A target out of range is reported as count -1, without
synchronising; the caller raises when it reads the count. A survivor out of range triggers a device
assertion, as an index out of range does in PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import checks, criteria, heads, reference

_GATE = "Tensor threshold, Tensor temperature, int criterion"
_PLACES = (
    "bool is_last, int exit, Tensor? rows, Tensor(a!) out_logits, Tensor(b!) out_confidence,"
    " Tensor(c!) out_prediction, Tensor(d!) out_exit_index, Tensor(e!) survivors,"
    " Tensor(f!) next_rows, Tensor(g!) count"
)
_FAMILY = (
    "Tensor? weight, Tensor? margins, Tensor? bias, float gamma, float scale, float label_smoothing"
)
SCHEMAS = {
    # -> confidence [N], prediction [N], survivors [N], count []
    "exit_gate": f"(Tensor logits, {_GATE}, Tensor? target, bool early_stop)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    # -> logits [N, C] ([0, C] without with_logits), pooled [N, D], and the outputs of exit_gate
    "exit_head": f"(Tensor features, Tensor weight, Tensor? bias, {_GATE}, Tensor? target,"
    " bool early_stop, bool with_logits) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # exit_gate and exit_head of the n samples of a batch of M that reach an exit. Results of those
    # that leave are written to their rows [n] (ascending; None: n <= M, in order) of the outputs
    # [M, C] and [M], the confidence in float32. The first `count` of survivors [>= n] and next_rows
    # [>= n] say who goes on: indices into the n samples, and rows, whose memory it must not share.
    # At the last exit all leave.
    "exit_gate_into": f"(Tensor logits, {_GATE}, {_PLACES}) -> ()",
    "exit_head_into": f"(Tensor features, Tensor weight, Tensor? bias, {_GATE}, {_PLACES}) -> ()",
    # -> features[survivors] [n, ...]
    "compact": "(Tensor features, Tensor survivors) -> Tensor",
    # out[k] = features[survivors[k]] for k < count (None: n); count is read on the device. The
    # other rows of out [>= n, ...] keep their values.
    "compact_into": "(Tensor(a!) out, Tensor features, Tensor survivors, Tensor? count) -> ()",
    # -> order [n]: row j < count (None: n) now holds what was row order[j]; later entries are N
    "compact_": "(Tensor(a!) features, Tensor survivors, Tensor? count) -> Tensor",
    # -> [rows, ...]
    "compact_backward": "(Tensor grad, Tensor survivors, SymInt rows) -> Tensor",
    # -> loss [N], log_sum [N] (log sum exp(x - max x)), and the outputs of exit_gate
    "exit_loss": f"(Tensor logits, Tensor target, {_FAMILY}, {_GATE})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # -> [N, C]
    "exit_loss_backward": "(Tensor grad_loss, Tensor logits, Tensor target, Tensor log_sum,"
    f" {_FAMILY}) -> Tensor",
}

_library = torch.library.Library("elf_fast", "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))

exit_gate = torch.ops.elf_fast.exit_gate.default
exit_head = torch.ops.elf_fast.exit_head.default
exit_gate_into = torch.ops.elf_fast.exit_gate_into.default
exit_head_into = torch.ops.elf_fast.exit_head_into.default
compact = torch.ops.elf_fast.compact.default
compact_into = torch.ops.elf_fast.compact_into.default
compact_ = torch.ops.elf_fast.compact_.default
compact_backward = torch.ops.elf_fast.compact_backward.default
exit_loss = torch.ops.elf_fast.exit_loss.default
exit_loss_backward = torch.ops.elf_fast.exit_loss_backward.default


# Reference kernels. Like the native kernels, they check targets and survivors before they run.


def _padded(gate: reference.ExitGate) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = gate.prediction.shape[0]
    survivors = torch.full_like(gate.prediction, rows)
    survivors[: gate.survivors.shape[0]] = gate.survivors
    count = torch.tensor(gate.survivors.shape[0], device=survivors.device)
    return gate.confidence, gate.prediction, survivors, count


def _exit_gate(logits, threshold, temperature, criterion, target, early_stop):
    checks.target_range(target, logits.shape[1])
    return _padded(
        reference.exit_gate(
            logits,
            threshold,
            temperature=temperature,
            criterion=criteria.by_code(criterion),
            target=target,
        )
    )


def _exit_head(
    features, weight, bias, threshold, temperature, criterion, target, early_stop, with_logits
):
    pooled = heads.pool(features).to(weight.dtype, copy=True)
    logits = torch.nn.functional.linear(pooled, weight, bias)
    gate = _exit_gate(logits, threshold, temperature, criterion, target, early_stop)
    return (logits if with_logits else logits.new_empty(0, logits.shape[1])), pooled, *gate


def _exit_gate_into(
    logits, threshold, temperature, criterion, is_last, exit, rows, out_logits, out_confidence,
    out_prediction, out_exit_index, survivors, next_rows, count,
):  # fmt: skip
    gate = _exit_gate(logits, threshold, temperature, criterion, None, False)
    found = reference.ExitGate(gate[0], gate[1], gate[2][: int(gate[3])])
    write_leavers(logits, found, is_last, exit, rows, out_logits, out_confidence, out_prediction,
                  out_exit_index, survivors, next_rows, count)  # fmt: skip


def write_leavers(
    logits: Tensor, gate: reference.ExitGate, is_last: bool, exit: int, rows: Tensor | None,
    out_logits: Tensor, out_confidence: Tensor, out_prediction: Tensor, out_exit_index: Tensor,
    survivors: Tensor, next_rows: Tensor, count: Tensor,
) -> None:  # fmt: skip
    """The second half of `exit_gate_into`: writes what a gate found of the logits [n, C]."""
    n = len(logits)
    checks.places(rows, n, len(out_logits))
    rows = torch.arange(n, device=logits.device) if rows is None else rows
    kept = gate.survivors[:0] if is_last else gate.survivors
    leaves = torch.ones(n, dtype=torch.bool, device=logits.device).index_fill_(0, kept, False)
    places = rows[leaves]
    out_logits[places] = logits[leaves]
    out_confidence[places] = gate.confidence[leaves].float()
    out_prediction[places] = gate.prediction[leaves]
    out_exit_index[places] = exit
    survivors[: len(kept)] = kept
    next_rows[: len(kept)] = rows[kept]
    count.fill_(len(kept))


def _exit_head_into(features, weight, bias, *rest):
    pooled = heads.pool(features).to(weight.dtype)
    _exit_gate_into(torch.nn.functional.linear(pooled, weight, bias), *rest)


def _compact(features, survivors):
    checks.survivors_values(survivors, features.shape[0])
    out = empty_batch(features, survivors.shape[0])  # index_select alone loses channels-last
    return torch.index_select(features, 0, survivors, out=out)


def _counted(survivors, count, rows):
    """The first `count` survivors (None: all), checked."""
    survivors = survivors if count is None else survivors[: int(count)]
    checks.survivors_values(survivors, rows)
    return survivors


def _compact_into(out, features, survivors, count):
    checks.batch_like("out", out, features, survivors.shape[0])
    survivors = _counted(survivors, count, features.shape[0])
    out[: survivors.shape[0]] = features.index_select(0, survivors)


def _compact_in_place(features, survivors, count):
    checks.movable(features)
    padded = torch.full_like(survivors, features.shape[0])
    survivors = _counted(survivors, count, features.shape[0])
    n = survivors.shape[0]
    staying = survivors[survivors < n]
    order = torch.arange(n, device=features.device)
    hole = torch.ones(n, dtype=torch.bool, device=features.device)
    hole[staying] = False
    order[hole] = survivors[len(staying) :]
    features[:n][hole] = features[order[hole]]
    padded[:n] = order
    return padded


def _compact_backward(grad, survivors, rows):
    checks.survivors_values(survivors, rows)
    return empty_batch(grad, rows).zero_().index_copy_(0, survivors, grad)


def _exit_loss(
    logits, target, weight, margins, bias, gamma, scale, label_smoothing, threshold, temperature,
    criterion,
):  # fmt: skip
    checks.target_range(target, logits.shape[1])
    out = reference.exit_loss(
        logits,
        target,
        weight=weight,
        gamma=gamma,
        scale=scale,
        margins=margins,
        bias=bias,
        label_smoothing=label_smoothing,
        threshold=threshold,
        temperature=temperature,
        criterion=criteria.by_code(criterion),
    )
    x = reference.adjusted(logits, target, margins, bias, scale)
    log_sum = (x - x.amax(dim=1, keepdim=True)).exp().sum(dim=1).log()
    return out.loss, log_sum, *_padded(reference.ExitGate(*out[1:]))


def _exit_loss_backward(
    grad_loss, logits, target, log_sum, weight, margins, bias, gamma, scale, label_smoothing
):
    """dloss/dx_c = w (F (q_c - t_c) - G (1[c = y] - q_c)) with t the smoothed target,
    F = (1 - p)^gamma and G = gamma (1 - p)^(gamma - 1) p CE."""
    C = logits.shape[1]
    x = reference.adjusted(logits, target, margins, bias, scale)
    log_q = (x - x.amax(dim=1, keepdim=True)) - log_sum[:, None]
    q = log_q.exp()
    nll = -log_q.gather(1, target[:, None]).squeeze(1)
    ce = (1 - label_smoothing) * nll - label_smoothing * log_q.mean(dim=1)
    hit = torch.nn.functional.one_hot(target, C).to(x.dtype)
    grad = q - (1 - label_smoothing) * hit - label_smoothing / C
    if gamma > 0:
        rest = -torch.expm1(-nll)
        G = torch.where(rest > 0, gamma * rest ** (gamma - 1) * (1 - rest) * ce, 0.0)
        grad = rest[:, None] ** gamma * grad - G[:, None] * (hit - q)
    per_row = grad_loss * scale
    if weight is not None:
        per_row = per_row * weight[target]
    return (per_row[:, None] * grad).to(logits.dtype)


_REFERENCE: dict[str, Callable[..., Any]] = {
    "exit_gate": _exit_gate,
    "exit_head": _exit_head,
    "exit_gate_into": _exit_gate_into,
    "exit_head_into": _exit_head_into,
    "compact": _compact,
    "compact_into": _compact_into,
    "compact_": _compact_in_place,
    "compact_backward": _compact_backward,
    "exit_loss": _exit_loss,
    "exit_loss_backward": _exit_loss_backward,
}


def register_reference(library: torch.library.Library, key: str, **options: Any) -> None:
    """Registers the reference kernels of all operators for a dispatch key."""
    for name, kernel in _REFERENCE.items():
        library.impl(name, kernel, key, **options)


register_reference(_library, "CompositeExplicitAutograd")


# Shapes


def batch_strides(x: Tensor) -> list[Any]:
    """Strides of a batch like x whose samples lie one after the other. If every sample of x is one
    block of memory (contiguous, channels-last), a sample has the strides of x, else contiguous
    ones."""
    if not checks.samples_are_dense(x):
        return list(torch.empty(x.shape, device="meta").stride())
    return [max(x.shape[1:].numel(), 1), *x.stride()[1:]]


def empty_batch(x: Tensor, rows: Any) -> Tensor:
    return torch.empty_strided(
        (rows, *x.shape[1:]), batch_strides(x), dtype=x.dtype, device=x.device
    )


def _fake_gate(logits: Tensor, rows: Any = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N = logits.shape[0] if rows is None else rows
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    index = logits.new_empty(N, dtype=torch.int64)
    return (
        logits.new_empty(N, dtype=acc),
        index,
        torch.empty_like(index),
        logits.new_empty((), dtype=torch.int64),
    )


def _fake_exit_gate(logits, threshold, temperature, criterion, target, early_stop):
    return _fake_gate(logits)


def _fake_exit_head(
    features, weight, bias, threshold, temperature, criterion, target, early_stop, with_logits
):
    N, D = features.shape[0], features.shape[2 if features.dim() == 3 else 1]
    logits = weight.new_empty(N if with_logits else 0, weight.shape[0])
    return logits, weight.new_empty(N, D), *_fake_gate(logits, N)


def _fake_compact(features, survivors):
    return empty_batch(features, survivors.shape[0])


def _fake_nothing(*args):
    return None


def _fake_compact_in_place(features, survivors, count):
    return torch.empty_like(survivors)


def _fake_compact_backward(grad, survivors, rows):
    return empty_batch(grad, rows)


def _fake_exit_loss(logits, target, *rest):
    confidence, *gate = _fake_gate(logits)
    loss, log_sum = torch.empty_like(confidence), torch.empty_like(confidence)
    return loss, log_sum, confidence, *gate


def _fake_exit_loss_backward(grad_loss, logits, *rest):
    return logits.new_empty(logits.shape)


_FAKES: dict[str, Callable[..., Any]] = {
    "exit_gate": _fake_exit_gate,
    "exit_head": _fake_exit_head,
    "exit_gate_into": _fake_nothing,
    "exit_head_into": _fake_nothing,
    "compact": _fake_compact,
    "compact_into": _fake_nothing,
    "compact_": _fake_compact_in_place,
    "compact_backward": _fake_compact_backward,
    "exit_loss": _fake_exit_loss,
    "exit_loss_backward": _fake_exit_loss_backward,
}


def _on_one_device(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """The fake of an operator if all its tensors are on one device, except scalars on the CPU.
    Otherwise it raises: torch also calls a fake if one tensor is on the meta device and the others
    are not, and its results hold no values."""
    arguments = getattr(torch.ops.elf_fast, name).default._schema.arguments

    @functools.wraps(fake)
    def checked(*args):
        for argument, value in zip(arguments, args, strict=True):
            if isinstance(value, Tensor) and (value.dim() or value.device.type != "cpu"):
                checks.same_device(argument.name, value, args[0].device)
        return fake(*args)

    return checked


for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"elf_fast::{_name}", _on_one_device(_name, _fake), lib=_library)


# Autograd


def _no_gradients(count: int) -> tuple[None, ...]:
    return (None,) * count


def _savable(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, with a copy of each that was made in inference mode: autograd saves no other."""
    return [t.clone() if t is not None and t.is_inference() else t for t in tensors]


class _GateGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, logits, threshold, temperature, criterion, target, early_stop):
        out = kernel(logits, threshold, temperature, criterion, target, early_stop)
        ctx.save_for_backward(logits, *_savable(temperature))
        ctx.criterion = criterion
        ctx.mark_non_differentiable(*out[0 if early_stop else 1 :])
        return out

    @staticmethod
    def backward(ctx, grad_confidence, *_):
        logits, temperature = ctx.saved_tensors
        criterion = criteria.by_code(ctx.criterion)
        grad = reference.statistic_grad(grad_confidence, logits, temperature, criterion)
        return None, grad, *_no_gradients(5)


class _HeadGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, features, weight, bias, *rest):
        if not rest[-1]:
            raise RuntimeError("exit_head: there is no gradient without the logits")
        out = kernel(features, weight, bias, *rest)
        ctx.save_for_backward(weight, out[1])
        ctx.features_shape, ctx.features_dtype = features.shape, features.dtype
        ctx.channels_last = features.dim() == 4 and not features.is_contiguous()
        ctx.has_bias = bias is not None
        ctx.mark_non_differentiable(*out[2:])
        return out

    @staticmethod
    def backward(ctx, grad_logits, grad_pooled, *_):
        weight, pooled = ctx.saved_tensors
        grad_pooled = grad_pooled + grad_logits @ weight
        grad_weight = grad_logits.mT @ pooled
        grad_bias = grad_logits.sum(dim=0) if ctx.has_bias else None
        shape = ctx.features_shape
        grad = grad_pooled.to(ctx.features_dtype)
        if len(shape) == 4:
            grad = (grad / (shape[2] * shape[3]))[:, :, None, None].expand(shape)
        elif len(shape) == 3:
            grad = (grad / shape[1])[:, None, :].expand(shape)
        layout = torch.channels_last if ctx.channels_last else torch.contiguous_format
        grad = grad.contiguous(memory_format=layout)
        return None, grad, grad_weight, grad_bias, *_no_gradients(6)


class _CompactGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, features, survivors):
        ctx.save_for_backward(*_savable(survivors))
        ctx.rows = features.shape[0]
        return kernel(features, survivors)

    @staticmethod
    def backward(ctx, grad):
        (survivors,) = ctx.saved_tensors
        return None, compact_backward(grad, survivors, ctx.rows), None


class _CompactBackwardGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, grad, survivors, rows):
        ctx.save_for_backward(*_savable(survivors))
        return kernel(grad, survivors, rows)

    @staticmethod
    def backward(ctx, grad):
        (survivors,) = ctx.saved_tensors
        return None, compact(grad, survivors), None, None


class _LossGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, logits, target, weight, margins, bias, *rest):
        out = kernel(logits, target, weight, margins, bias, *rest)
        ctx.save_for_backward(logits, out[1], *_savable(target, weight, margins, bias))
        ctx.scalars = rest[:3]  # gamma, scale, label_smoothing
        ctx.mark_non_differentiable(*out[1:])
        return out

    @staticmethod
    def backward(ctx, grad_loss, *_):
        logits, log_sum, target, *vectors = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: exit_loss_backward has no gradient
            loss = reference.family_loss(logits, target, *vectors, *ctx.scalars)
            (grad,) = torch.autograd.grad(loss, logits, grad_loss, create_graph=True)
        else:
            grad = exit_loss_backward(grad_loss, logits, target, log_sum, *vectors, *ctx.scalars)
        return None, grad, *_no_gradients(10)


# The same operators for torch.func and forward mode, which need derivatives of derivatives, batches
# of them and tangents: what has a derivative is computed in plain PyTorch, the rest by the kernel.
# `run` is the kernel.


def _gate_in_torch(run, logits, threshold, temperature, criterion, target, early_stop):
    out = run(logits, threshold, temperature, criterion, target, early_stop)
    if early_stop:
        return out
    return reference.statistic(logits, temperature, criteria.by_code(criterion)), *out[1:]


def _head_in_torch(run, features, weight, bias, *rest):
    out = run(features, weight, bias, *rest)
    if not rest[-1]:
        return out
    pooled = heads.pool(features).to(weight.dtype)
    return torch.nn.functional.linear(pooled, weight, bias), pooled, *out[2:]


def _compact_in_torch(run, features, survivors):
    return features.index_select(0, survivors)


def _compact_backward_in_torch(run, grad, survivors, rows):
    return grad.new_zeros(rows, *grad.shape[1:]).index_copy(0, survivors, grad)


def _loss_in_torch(run, logits, target, *settings):
    out = run(logits, target, *settings)
    return reference.family_loss(logits, target, *settings[:6]), *out[1:]


#: Whether torch.func (grad, jvp, vmap and others) is running in this thread.
transforms_active = torch._C._are_functorch_transforms_active


def tangents_active() -> bool:
    """Whether tensors may carry tangents of forward mode (torch.autograd.forward_ad)."""
    return forward_ad._current_level >= 0


def _register_autograd(
    name: str, function: type[torch.autograd.Function], in_torch: Callable[..., Any]
) -> None:
    """Does what torch.library.register_autograd does, without the 35 us per call that it spends on
    looking up defaults, and for torch.func and forward mode, too."""
    op = getattr(torch.ops.elf_fast, name).default

    def kernel(keyset, *args):
        below = keyset & torch._C._after_autograd_keyset

        def run(*inputs):
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(below, *inputs)

        if transforms_active() or tangents_active():
            return in_torch(run, *args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(run, *args)
        return run(*args)

    _library.impl(name, kernel, "Autograd", with_keyset=True)


for _name, _function, _in_torch in (
    ("exit_gate", _GateGrad, _gate_in_torch),
    ("exit_head", _HeadGrad, _head_in_torch),
    ("compact", _CompactGrad, _compact_in_torch),
    ("compact_backward", _CompactBackwardGrad, _compact_backward_in_torch),
    ("exit_loss", _LossGrad, _loss_in_torch),
):
    _register_autograd(_name, _function, _in_torch)


# Autocast casts the inputs of the classifier, as for nn.Linear. The gate and the loss compute in
# float32 anyway.


def _autocast_exit_head(device: str, key: str) -> Callable[..., Any]:
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(features, weight, bias, *rest):
        dtype = torch.get_autocast_dtype(device)
        if weight.dtype != torch.float64:
            weight = weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return exit_head(features, weight, bias, *rest)

    return kernel


_library.impl("exit_head", _autocast_exit_head("cpu", "AutocastCPU"), "AutocastCPU")
_library.impl("exit_head", _autocast_exit_head("cuda", "AutocastCUDA"), "AutocastCUDA")
