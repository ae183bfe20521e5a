"""exit_gate: softmax statistic, argmax, exit test and survivors of logits [N, C].

    p = softmax(z / T);  statistic = max p | max p - second largest p | entropy(p) / log C

The first kernel computes the state of every row (`row_state.py`): a program takes a few rows and
reads each logit once, one tile of classes at a time. If there are few rows with many classes, each
row is split over several programs. The second kernel turns the states into confidence, prediction
and survivors (`survivors.py`). For more than 1024 rows a third kernel writes the survivors.

Bytes: L (the bytes of the logits), and about 50 per row. Deterministic: no atomics, and states are
merged in a fixed order.
"""

import torch
import triton
import triton.language as tl

from . import row_state, survivors

#: Number of programs that fill a device.
PROGRAMS = 256


@triton.jit
def _row_states(
    logits, row_vectors, stride_c, temperature, states, indices, plane, N, class_vectors,
    split_size, CRITERION: tl.constexpr, T_IS_POINTER: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """States of ROWS rows over `split_size` classes. VECTOR: see `row_state.vector_width`."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    inside_rows = rows < N
    inverse_T = row_state.inverse(temperature, T_IS_POINTER, states)
    start = split * split_size
    end = tl.minimum(start + split_size, class_vectors * VECTOR)
    m, index, s, u = row_state.no_state(
        inverse_T + tl.zeros([ROWS], states.dtype.element_ty), CRITERION
    )
    for c in range(start, end, CLASSES):
        classes = c + tl.arange(0, CLASSES)
        inside = classes < end
        z = tl.load(
            logits
            + rows[:, None] * row_vectors * VECTOR
            + classes[None, :].to(tl.int64) * stride_c,
            mask=inside_rows[:, None] & inside[None, :],
            other=0.0,
        ).to(states.dtype.element_ty)
        m_b, index_b, s_b, u_b = row_state.tile_state(z, classes, inside, inverse_T, CRITERION)
        m, index, s, u = row_state.merge(
            m, index, s, u, m_b, index_b, s_b, u_b, inverse_T, CRITERION
        )
    row_state.store_state(m, index, s, u, states, indices, rows, inside_rows, split, plane, N)


def exit_gate(
    logits: torch.Tensor,  # [N, C]
    threshold: torch.Tensor,  # [] or [C]
    temperature: torch.Tensor,  # []
    criterion: int,
    target: torch.Tensor | None,  # [N]
    early_stop: bool,  # ignored: it needs a row's maximum, known only after reading the whole row
):
    row_state.check_criterion(criterion)
    N, C = logits.shape
    rows, classes = row_state.tile(N, C)
    blocks = triton.cdiv(N, rows)
    tiles = triton.cdiv(C, classes)
    split_tiles = triton.cdiv(tiles, max(1, min(tiles, PROGRAMS // max(1, blocks))))
    splits = triton.cdiv(tiles, split_tiles)
    states, indices = row_state.empty_states(splits, N, logits)
    T, T_is_pointer = row_state.setting(temperature)
    vector = row_state.vector_width(logits)
    if N:
        _row_states[(blocks, splits)](
            logits, logits.stride(0) // vector, logits.stride(1), T, states, indices, splits * N, N,
            C // vector, split_tiles * classes, CRITERION=criterion, T_IS_POINTER=T_is_pointer,
            VECTOR=vector, ROWS=rows, CLASSES=classes,
            num_warps=row_state.warps(rows * classes, 16 // logits.element_size()),
        )  # fmt: skip
    return survivors.finish(states, indices, threshold, temperature, criterion, target, C)
