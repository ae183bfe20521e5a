"""exit_gate: softmax statistics, argmax, confidence test and survivors of logits [N, C].

First kernel: the state of every row (`gate.py`), a tile of classes at a time, each logit read once;
with few rows and many classes a row is split over several programs. Second kernel: states to
confidence, prediction and survivors; past 1024 rows a third places the survivors.

Bytes: L + about 50 a row. Deterministic: no atomics, merges in a fixed order.
"""

import torch
import triton
import triton.language as tl

from . import gate

#: Programs that fill a device.
PROGRAMS = 256


@triton.jit
def _row_states(
    logits, row_vectors, stride_c, temperature, states, indices, plane, N, class_vectors,
    split_size, CRITERION: tl.constexpr, T_IS_POINTER: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """States of ROWS rows over `split_size` of their classes. See `gate.vector` for VECTOR."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    inside_rows = rows < N
    inverse_T = gate.inverse(temperature, T_IS_POINTER, states)
    start = split * split_size
    end = tl.minimum(start + split_size, class_vectors * VECTOR)
    m, index, s, u = gate.no_state(inverse_T + tl.zeros([ROWS], states.dtype.element_ty), CRITERION)
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
        m_b, index_b, s_b, u_b = gate.tile_state(z, classes, inside, inverse_T, CRITERION)
        m, index, s, u = gate.merge(m, index, s, u, m_b, index_b, s_b, u_b, inverse_T, CRITERION)
    gate.store_state(m, index, s, u, states, indices, rows, inside_rows, split, plane, N)


def exit_gate(
    logits: torch.Tensor,  # [N, C]
    threshold: torch.Tensor,  # [] or [C]
    temperature: torch.Tensor,  # []
    criterion: int,
    target: torch.Tensor | None,  # [N]
    early_stop: bool,  # no use here: a row's bytes are read before its maximum is known
):
    N, C = logits.shape
    rows, classes = gate.tile(N, C)
    blocks = triton.cdiv(N, rows)
    tiles = triton.cdiv(C, classes)
    split_tiles = triton.cdiv(tiles, max(1, min(tiles, PROGRAMS // max(1, blocks))))
    splits = triton.cdiv(tiles, split_tiles)
    states, indices = gate.empty_states(splits, N, logits)
    T, T_is_pointer = gate.setting(temperature)
    vector = gate.vector(logits)
    if N:
        _row_states[(blocks, splits)](
            logits, logits.stride(0) // vector, logits.stride(1), T, states, indices, splits * N, N,
            C // vector, split_tiles * classes, CRITERION=criterion, T_IS_POINTER=T_is_pointer,
            VECTOR=vector, ROWS=rows, CLASSES=classes,
            num_warps=gate.warps(rows * classes, 16 // logits.element_size()),
        )  # fmt: skip
    return gate.finish(states, indices, threshold, temperature, criterion, target, C)
