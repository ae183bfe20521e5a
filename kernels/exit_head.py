"""exit_head: global average pool, linear classifier and exit gate of features [N, D, H, W] (in
either memory format), tokens [N, T, D] or vectors [N, D].

    pooled = mean of features over positions;  z = pooled W^T + b;  then exit_gate(z)

The first kernel pools; it reads the features once. The second computes tiles of pooled W^T on the
tensor cores and merges each tile into the states of its rows (`row_state.py`) in registers. It
writes logits only if they are asked for. Rows are split over classes until the device is full. The
third kernel is the end of exit_gate (`survivors.py`).

Bytes: the features once, W once per block of rows (from the second-level cache after the first
block), pooled [N, D] and row states. Deterministic.
"""

import torch
import triton
import triton.language as tl

from . import exit_gate, row_state, survivors


@triton.jit
def _pool(
    features, stride_n, pooled, D, d_blocks,
    STRIDE_D: tl.constexpr, STRIDE_P: tl.constexpr, P: tl.constexpr, CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):  # fmt: skip
    """Means of CHANNELS channels of one sample.

    The strides and P, the number of positions, are compile-time constants. The addresses of a
    thread's loads then differ by constants and need one pair of registers instead of one pair per
    load, so two to three times as many programs fit on a multiprocessor.
    """
    program = tl.program_id(0)
    n = (program // d_blocks).to(tl.int64)
    first = (program % d_blocks) * CHANNELS
    d = tl.arange(0, CHANNELS)
    p = tl.arange(0, POSITIONS)
    inside = first + d < D
    acc = tl.float64 if features.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([CHANNELS], acc)
    tile = features + n * stride_n + first.to(tl.int64) * STRIDE_D
    for start in range(0, P, POSITIONS):
        x = tl.load(
            tile + d.to(tl.int64)[None, :] * STRIDE_D + p.to(tl.int64)[:, None] * STRIDE_P,
            mask=inside[None, :] & (start + p < P)[:, None],
            other=0.0,
        )
        total += tl.sum(x.to(acc), axis=0)
        tile += POSITIONS * STRIDE_P
    mean = (total / P).to(features.dtype.element_ty)
    tl.store(pooled + n * D + first + d, mean.to(pooled.dtype.element_ty), mask=inside)


@triton.jit
def _classify(
    pooled, weight, stride_c, stride_d, bias, temperature, logits, states, indices, plane, N, D,
    class_vectors, split_size,
    CRITERION: tl.constexpr, T_IS_POINTER: tl.constexpr, HAS_BIAS: tl.constexpr,
    WITH_LOGITS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Logits of ROWS rows and `split_size` classes, and the states of the rows over these classes.

    WIDEN converts the factors to float32, which changes no product. Triton's interpreter needs it,
    because it treats bfloat16 as integers. VECTOR: see `row_state.vector_width`.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    inside_rows = rows < N
    inverse_T = row_state.inverse(temperature, T_IS_POINTER, states)
    start = split * split_size
    end = tl.minimum(start + split_size, class_vectors * VECTOR)
    m, index, s, u = row_state.no_state(inverse_T + tl.zeros([ROWS], tl.float32), CRITERION)
    for c in range(start, end, CLASSES):
        classes = c + tl.arange(0, CLASSES)
        inside = classes < end
        z = tl.zeros([ROWS, CLASSES], tl.float32)
        for first in range(0, D, CHANNELS):
            d = first + tl.arange(0, CHANNELS)
            x = tl.load(
                pooled + rows[:, None] * D + d[None, :],
                mask=inside_rows[:, None] & (d < D)[None, :],
                other=0.0,
            )
            w = tl.load(
                weight + classes[None, :].to(tl.int64) * stride_c + d[:, None] * stride_d,
                mask=inside[None, :] & (d < D)[:, None],
                other=0.0,
            )
            if WIDEN:
                x = x.to(tl.float32)
                w = w.to(tl.float32)
            z = tl.dot(x, w, z, input_precision=PRECISION)
        if HAS_BIAS:
            z += tl.load(bias + classes, mask=inside, other=0.0).to(tl.float32)[None, :]
        # The gate uses the logits that are returned, which are rounded to the classifier's dtype.
        rounded = z.to(weight.dtype.element_ty)
        if WITH_LOGITS:
            at = logits + rows[:, None] * (class_vectors * VECTOR) + classes[None, :]
            tl.store(at, rounded, mask=inside_rows[:, None] & inside[None, :])
        m_b, index_b, s_b, u_b = row_state.tile_state(
            rounded.to(tl.float32), classes, inside, inverse_T, CRITERION
        )
        m, index, s, u = row_state.merge(
            m, index, s, u, m_b, index_b, s_b, u_b, inverse_T, CRITERION
        )
    row_state.store_state(m, index, s, u, states, indices, rows, inside_rows, split, plane, N)


def pool(features: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[N, D] means over positions, rounded to the features' dtype, then to `dtype`."""
    if features.dim() == 2:
        x = features[:, :, None]
    elif features.dim() == 3:
        x = features.mT
    else:
        one_stride = features.stride(2) == features.shape[3] * features.stride(3)
        x = (features if one_stride else features.contiguous()).flatten(2)
    N, D, P = x.shape
    pooled = x.new_empty((N, D), dtype=dtype)
    # The long side of a tile runs over what is contiguous in memory: positions or channels.
    if x.stride(2) == 1 and P > 1:
        positions = min(256, triton.next_power_of_2(P))
        channels = max(1, min(triton.next_power_of_2(D), 4096 // positions))
    else:
        channels = min(256, triton.next_power_of_2(D))
        positions = max(1, min(triton.next_power_of_2(P), 4096 // channels))
    blocks = triton.cdiv(D, channels)
    if N:
        _pool[(N * blocks,)](
            x, x.stride(0), pooled, D, blocks, STRIDE_D=x.stride(1), STRIDE_P=x.stride(2), P=P,
            CHANNELS=channels, POSITIONS=positions,
            num_warps=row_state.warps(channels * positions, 16),
        )  # fmt: skip
    return pooled


def _precision() -> str:
    """The precision that PyTorch's own float32 matrix products are set to."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def exit_head(
    features: torch.Tensor,  # [N, D, H, W], [N, T, D] or [N, D]
    weight: torch.Tensor,  # [C, D]
    bias: torch.Tensor | None,  # [C]
    threshold: torch.Tensor,  # [] or [C]
    temperature: torch.Tensor,  # []
    criterion: int,
    target: torch.Tensor | None,  # [N]
    early_stop: bool,
    with_logits: bool,
):
    row_state.check_criterion(criterion)
    pooled = pool(features, weight.dtype)
    if weight.dtype == torch.float64:  # used by gradient checks, so speed does not matter
        logits = torch.nn.functional.linear(pooled, weight, bias)
        gated = exit_gate.exit_gate(logits, threshold, temperature, criterion, target, early_stop)
        return logits if with_logits else logits.new_empty(0, len(weight)), pooled, *gated
    (N, D), C = pooled.shape, weight.shape[0]
    if weight.shape[1] != D:
        raise ValueError(f"weight: expected [C, {D}], got {list(weight.shape)}")
    if bias is not None:
        bias = bias.contiguous()
        row_state.check_vector(C, weight.dtype, bias=bias)
    rows = max(16, min(64, triton.next_power_of_2(N)))
    classes = 64 if C > 32 else 32
    blocks, tiles = triton.cdiv(N, rows), triton.cdiv(C, classes)
    split_tiles = triton.cdiv(tiles, max(1, min(tiles, exit_gate.PROGRAMS // max(1, blocks))))
    splits = triton.cdiv(tiles, split_tiles)
    states, indices = row_state.empty_states(splits, N, weight)
    logits = weight.new_empty((N if with_logits else 0, C))
    vector = row_state.vector_width(logits)
    # A program waits for memory once per tile of channels, so tiles are as large as possible. For
    # float32, a larger tile or a third stage would spill registers.
    channels, stages = (32, 2) if weight.dtype == torch.float32 else (64, 3)
    T, T_is_pointer = row_state.setting(temperature)
    if N:
        _classify[(blocks, splits)](
            pooled, weight, weight.stride(0), weight.stride(1), bias, T, logits, states, indices,
            splits * N, N, D, C // vector, split_tiles * classes, CRITERION=criterion,
            T_IS_POINTER=T_is_pointer, HAS_BIAS=bias is not None, WITH_LOGITS=with_logits,
            PRECISION=_precision(), WIDEN=weight.device.type == "cpu", VECTOR=vector, ROWS=rows,
            CLASSES=classes, CHANNELS=max(16, min(channels, triton.next_power_of_2(D))),
            num_warps=8, num_stages=stages,
        )  # fmt: skip
    gated = survivors.finish(states, indices, threshold, temperature, criterion, target, C)
    return logits, pooled, *gated
