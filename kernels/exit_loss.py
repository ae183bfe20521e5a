"""exit_loss: the long-tail loss family of logits [N, C], its gradient, and the exit gate.

    x = s (z - delta_y e_y) + b,  q = softmax(x),  p = q_y
    loss = w_y (1 - p)^gamma [(1 - eps) (-log p) + eps mean_c(-log q_c)]

Forward: one program per block of rows reads each logit once and keeps two states (`row_state.py`),
that of z for the gate and that of x for the loss. `survivors.finish` computes the gate's outputs.
Backward: one program per block of rows reads the rows twice, the second time from cache. The first
pass finds the maximum of x, the second writes

    dloss/dx_c = w (F (q_c - t_c) - G (1[c = y] - q_c)),  F = (1 - p)^gamma,
    G = gamma (1 - p)^(gamma - 1) p CE,  t the smoothed target, CE the bracket above.

Bytes: L (the bytes of the logits) forward, 2 L backward. A target outside [0, C) causes no access
out of bounds: its loss and gradient are NaN, and the count is -1. Deterministic.
"""

import torch
import triton
import triton.language as tl

from . import row_state, survivors


@triton.jit
def _adjusted(
    logits, row_vectors, stride_c, rows, inside_rows, classes, inside, y, delta, bias, scale,
    HAS_BIAS: tl.constexpr, VECTOR: tl.constexpr, like,
):  # fmt: skip
    """z and x of a tile, in the element type of the pointer `like`."""
    z = tl.load(
        logits + rows[:, None] * row_vectors * VECTOR + classes[None, :].to(tl.int64) * stride_c,
        mask=inside_rows[:, None] & inside[None, :],
        other=0.0,
    ).to(like.dtype.element_ty)
    x = scale * (z - tl.where(classes[None, :] == y[:, None], delta[:, None], 0.0))
    if HAS_BIAS:
        x += tl.load(bias + classes, mask=inside, other=0.0)[None, :]
    return z, x


@triton.jit
def _of_target(vector, y, valid, HAS: tl.constexpr, default: tl.constexpr, like):
    """vector[y], or the default if there is no vector."""
    value = tl.zeros(y.shape, like.dtype.element_ty) + default
    if HAS:
        value = tl.load(vector + y, mask=valid, other=default)
    return value


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0. For x > -1/2 the difference would lose digits, so the Taylor series is
    used; its truncation error is 1e-17 at -1/2."""
    series = tl.zeros(x.shape, x.dtype) + 1.0
    for k in tl.static_range(15, 1, -1):
        series = 1.0 + series * x * (1.0 / k)
    return tl.where(x > -0.5, series * x, tl.exp(x) - 1.0)


@triton.jit
def _row_terms(
    m, log_sum, x_y, sum_x, w, gamma, smoothing, C,
    HAS_GAMMA: tl.constexpr, SMOOTHED: tl.constexpr,
):  # fmt: skip
    """q_y - 1, CE, F and G of rows with maximum m and log sum exp(x - m)."""
    nll = (m - x_y) + log_sum
    q_less_1 = _expm1(-nll)
    ce = nll
    if SMOOTHED:
        ce = (1.0 - smoothing) * nll + smoothing * ((m - sum_x / C) + log_sum)
    modulation = tl.zeros(nll.shape, nll.dtype) + 1.0
    G = tl.zeros(nll.shape, nll.dtype)
    if HAS_GAMMA:
        rest = -q_less_1
        log_rest = tl.log2(rest)
        modulation = tl.exp2(gamma * log_rest)
        G = tl.where(rest > 0, gamma * tl.exp2((gamma - 1.0) * log_rest) * (1.0 - rest) * ce, 0.0)
    return q_less_1, ce, modulation, G


@triton.jit
def _forward(
    logits, row_vectors, stride_c, target, weight, margins, bias, gamma, scale, smoothing,
    temperature, loss, log_sums, states, indices, N, C, class_vectors,
    CRITERION: tl.constexpr, T_IS_POINTER: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_MARGINS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GAMMA: tl.constexpr,
    SMOOTHED: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside_rows = rows < N
    inverse_T = row_state.inverse(temperature, T_IS_POINTER, states)
    y = tl.load(target + rows, mask=inside_rows, other=0)
    valid = (y >= 0) & (y < C)
    delta = _of_target(margins, y, valid, HAS_MARGINS, 0.0, states)
    zero = tl.zeros([ROWS], states.dtype.element_ty)
    m, index, s, u = row_state.no_state(inverse_T + zero, CRITERION)
    m_x, index_x, s_x, u_x = row_state.no_state(zero, row_state.CONFIDENCE)
    x_y = zero
    sum_x = zero
    for c in range(0, class_vectors * VECTOR, CLASSES):
        classes = c + tl.arange(0, CLASSES)
        inside = classes < class_vectors * VECTOR
        z, x = _adjusted(
            logits, row_vectors, stride_c, rows, inside_rows, classes, inside, y, delta, bias,
            scale, HAS_BIAS, VECTOR, states,
        )  # fmt: skip
        m_b, index_b, s_b, u_b = row_state.tile_state(z, classes, inside, inverse_T, CRITERION)
        m, index, s, u = row_state.merge(
            m, index, s, u, m_b, index_b, s_b, u_b, inverse_T, CRITERION
        )
        m_b, index_b, s_b, u_b = row_state.tile_state(x, classes, inside, 1.0, row_state.CONFIDENCE)
        m_x, index_x, s_x, u_x = row_state.merge(
            m_x, index_x, s_x, u_x, m_b, index_b, s_b, u_b, 1.0, row_state.CONFIDENCE
        )
        x_y += tl.sum(tl.where(classes[None, :] == y[:, None], x, 0.0), axis=1)
        if SMOOTHED:
            sum_x += tl.sum(tl.where(inside[None, :], x, 0.0), axis=1)
    row_state.store_state(
        m, index, s, u, states, indices, rows, inside_rows, tl.program_id(1), N, N
    )
    # As in log_softmax, the whole row is NaN if its maximum is NaN or infinite.
    finite = (m_x == m_x) & (tl.abs(m_x) < float("inf")) & valid
    log_sum = tl.where(finite, tl.log(s_x), float("nan"))
    w = _of_target(weight, y, valid, HAS_WEIGHT, 1.0, states)
    _, ce, modulation, _ = _row_terms(
        m_x, log_sum, x_y, sum_x, w, gamma, smoothing, C, HAS_GAMMA, SMOOTHED
    )
    tl.store(loss + rows, w * modulation * ce, mask=inside_rows)
    tl.store(log_sums + rows, log_sum, mask=inside_rows)


@triton.jit
def _backward(
    grad_loss, grad_stride, logits, row_vectors, stride_c, target, log_sums, weight, margins, bias,
    gamma, scale, smoothing, grad, N, C, class_vectors,
    HAS_WEIGHT: tl.constexpr, HAS_MARGINS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_GAMMA: tl.constexpr, SMOOTHED: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside_rows = rows < N
    y = tl.load(target + rows, mask=inside_rows, other=0)
    valid = (y >= 0) & (y < C)
    delta = _of_target(margins, y, valid, HAS_MARGINS, 0.0, log_sums)
    m = tl.zeros([ROWS], log_sums.dtype.element_ty) - float("inf")
    x_y = tl.zeros([ROWS], log_sums.dtype.element_ty)
    sum_x = tl.zeros([ROWS], log_sums.dtype.element_ty)
    for c in range(0, class_vectors * VECTOR, CLASSES):
        classes = c + tl.arange(0, CLASSES)
        inside = classes < class_vectors * VECTOR
        _, x = _adjusted(
            logits, row_vectors, stride_c, rows, inside_rows, classes, inside, y, delta, bias,
            scale, HAS_BIAS, VECTOR, log_sums,
        )  # fmt: skip
        m = tl.maximum(m, tl.max(tl.where(inside[None, :], x, -float("inf")), axis=1))
        x_y += tl.sum(tl.where(classes[None, :] == y[:, None], x, 0.0), axis=1)
        if SMOOTHED:
            sum_x += tl.sum(tl.where(inside[None, :], x, 0.0), axis=1)
    log_sum = tl.load(log_sums + rows, mask=inside_rows, other=0.0)
    w = _of_target(weight, y, valid, HAS_WEIGHT, 1.0, log_sums)
    q_less_1, ce, modulation, G = _row_terms(
        m, log_sum, x_y, sum_x, w, gamma, smoothing, C, HAS_GAMMA, SMOOTHED
    )
    g = tl.load(grad_loss + rows * grad_stride, mask=inside_rows, other=0.0) * scale * w
    P = g * (modulation + G)
    Q = -g * modulation * smoothing / C
    # The target's term is computed from q_y - 1, which keeps its digits near q_y = 1.
    at_y = g * (modulation * (q_less_1 + smoothing) + G * q_less_1) + Q
    for c in range(0, class_vectors * VECTOR, CLASSES):
        classes = c + tl.arange(0, CLASSES)
        inside = classes < class_vectors * VECTOR
        _, x = _adjusted(
            logits, row_vectors, stride_c, rows, inside_rows, classes, inside, y, delta, bias,
            scale, HAS_BIAS, VECTOR, log_sums,
        )  # fmt: skip
        q = tl.exp((x - m[:, None]) - log_sum[:, None])
        value = P[:, None] * q + Q[:, None]
        value = tl.where(classes[None, :] == y[:, None], at_y[:, None], value)
        tl.store(
            grad + rows[:, None] * (class_vectors * VECTOR) + classes[None, :],
            value.to(grad.dtype.element_ty),
            mask=inside_rows[:, None] & inside[None, :],
        )


def _check_family(C, dtype, weight, margins, bias):
    for name, vector in (("weight", weight), ("margins", margins), ("bias", bias)):
        if vector is not None:
            row_state.check_vector(C, dtype, **{name: vector})


def _launch(logits, weight, margins, bias, gamma, label_smoothing):
    """Grid and compile-time arguments of the forward and the backward kernel."""
    N, C = logits.shape
    rows, classes = row_state.tile(N, C)
    return (triton.cdiv(N, rows),), {
        "HAS_WEIGHT": weight is not None, "HAS_MARGINS": margins is not None,
        "HAS_BIAS": bias is not None, "HAS_GAMMA": gamma > 0, "SMOOTHED": label_smoothing > 0,
        "VECTOR": row_state.vector_width(logits), "ROWS": rows, "CLASSES": classes,
        "num_warps": row_state.warps(rows * classes, 16 // logits.element_size()),
    }  # fmt: skip


def exit_loss(
    logits: torch.Tensor,  # [N, C]
    target: torch.Tensor,  # [N]
    weight: torch.Tensor | None,  # [C], like margins and bias
    margins: torch.Tensor | None,
    bias: torch.Tensor | None,
    gamma: float,
    scale: float,
    label_smoothing: float,
    threshold: torch.Tensor,  # [] or [C]
    temperature: torch.Tensor,  # []
    criterion: int,
):
    row_state.check_criterion(criterion)
    N, C = logits.shape
    row_state.check_vector(N, torch.int64, target=target)
    _check_family(C, row_state.arithmetic(logits), weight, margins, bias)
    states, indices = row_state.empty_states(1, N, logits)
    loss, log_sum = (states.new_empty(N) for _ in range(2))
    T, T_is_pointer = row_state.setting(temperature)
    grid, shared = _launch(logits, weight, margins, bias, gamma, label_smoothing)
    if N:
        _forward[grid](
            logits, logits.stride(0) // shared["VECTOR"], logits.stride(1), target, weight, margins,
            bias, gamma, scale, label_smoothing, T, loss, log_sum, states, indices, N, C,
            C // shared["VECTOR"], CRITERION=criterion, T_IS_POINTER=T_is_pointer, **shared,
        )  # fmt: skip
    gated = survivors.finish(states, indices, threshold, temperature, criterion, target, C)
    return loss, log_sum, *gated


def exit_loss_backward(
    grad_loss: torch.Tensor,  # [N]
    logits: torch.Tensor,
    target: torch.Tensor,
    log_sum: torch.Tensor,  # [N]
    weight: torch.Tensor | None,
    margins: torch.Tensor | None,
    bias: torch.Tensor | None,
    gamma: float,
    scale: float,
    label_smoothing: float,
) -> torch.Tensor:
    N, C = logits.shape
    row_state.check_vector(N, torch.int64, target=target)
    row_state.check_vector(N, row_state.arithmetic(logits), log_sum=log_sum)
    row_state.check_vector(N, row_state.arithmetic(logits), contiguous=False, grad_loss=grad_loss)
    _check_family(C, row_state.arithmetic(logits), weight, margins, bias)
    grad = logits.new_empty((N, C))
    grid, shared = _launch(logits, weight, margins, bias, gamma, label_smoothing)
    if N:
        _backward[grid](
            grad_loss, grad_loss.stride(0), logits, logits.stride(0) // shared["VECTOR"],
            logits.stride(1), target, log_sum, weight, margins, bias, gamma, scale, label_smoothing,
            grad, N, C, C // shared["VECTOR"], **shared,
        )  # fmt: skip
    return grad
