"""The exit test and the survivors, from the states of the rows (`row_state.py`).

    statistic = max p                        confidence
                max p - second largest p     margin
                entropy(p) / log C           entropy

`_finish` merges the splits of each row, computes the statistic and tests it. A row survives unless
it passes the test and, where a target is given, its prediction is right. For up to ROWS rows one
program also writes the survivors. For more, `_finish` writes a flag per row and a count per
program, and a second kernel, `_scan`, writes the survivors.

Bytes per row: 16 per split read, 20 written, and 9 more for flags where there are several programs.
Deterministic: no atomics.
"""

import torch
import triton
import triton.language as tl

from . import row_state

#: Maximum number of rows of one program of `_finish`.
ROWS = 1024

#: Added to a program's number of survivors if a target of its rows was out of range.
BAD = tl.constexpr(2**20)


@triton.jit
def _statistic(m, s, u, C, inverse_T, CRITERION: tl.constexpr):
    if CRITERION == row_state.MARGIN:
        _, second = row_state.relative(u, m, inverse_T)
        value = tl.where(C == 1, 1.0, (1.0 - second) / s)
    elif CRITERION == row_state.ENTROPY:
        classes = tl.maximum(C, 2).to(s.dtype)
        value = tl.where(C == 1, 0.0, (tl.log(s) - u / s) / tl.log(classes))
    else:
        tl.static_assert(CRITERION == row_state.CONFIDENCE, "a criterion without a formula")
        value = 1.0 / s
    return tl.where(m != m, float("nan"), value)


@triton.jit
def _finish(
    states, indices, splits, plane, threshold, temperature, target, confidence, prediction, flags,
    counts, survivors, count, N, C,
    CRITERION: tl.constexpr, LARGER_IS_SURER: tl.constexpr, T_IS_POINTER: tl.constexpr,
    THRESHOLD: tl.constexpr, HAS_TARGET: tl.constexpr, ONE_PROGRAM: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Writes statistic and prediction of ROWS rows from their states. With ONE_PROGRAM it also
    writes the survivors, otherwise a flag per row and the number of survivors (plus BAD if a target
    was out of range).

    THRESHOLD: "value" (a number), "pointer" (to one number) or "classes" (to one per class).
    """
    program = tl.program_id(0)
    rows = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    inverse_T = row_state.inverse(temperature, T_IS_POINTER, states)
    first = tl.load(states + rows, mask=inside, other=0.0)
    m, index, s, u = row_state.no_state(first, CRITERION)
    at = rows
    for _ in range(0, splits):
        m_b = tl.load(states + at, mask=inside, other=0.0)
        s_b = tl.load(states + plane + at, mask=inside, other=1.0)
        u_b = tl.load(states + 2 * plane + at, mask=inside, other=0.0)
        index_b = tl.load(indices + at, mask=inside, other=0)
        m, index, s, u = row_state.merge(
            m, index, s, u, m_b, index_b, s_b, u_b, inverse_T, CRITERION
        )
        at += N
    value = _statistic(m, s, u, C, inverse_T, CRITERION)
    if THRESHOLD == "classes":
        t = tl.load(threshold + index, mask=inside, other=0.0)
    else:
        t = row_state.scalar(threshold, THRESHOLD == "pointer")
    if LARGER_IS_SURER:
        leaves = value >= t
    else:
        leaves = value <= t
    bad = 0
    if HAS_TARGET:
        y = tl.load(target + rows, mask=inside, other=0)
        leaves = leaves & (y == index)
        bad = tl.max(((y < 0) | (y >= C)).to(tl.int32), axis=0)
    tl.store(confidence + rows, value, mask=inside)
    tl.store(prediction + rows, index.to(tl.int64), mask=inside)
    goes_on = (inside & (leaves == 0)).to(tl.int32)
    n = tl.sum(goes_on, axis=0)
    if ONE_PROGRAM:
        _write_survivors(goes_on, n * 0, n, survivors, rows, inside, N)
        tl.store(count, tl.where(bad > 0, -1, n).to(tl.int64))
    else:
        tl.store(flags + rows, goes_on.to(tl.int8), mask=inside)
        tl.store(counts + program, n + bad * BAD)


@triton.jit
def _write_survivors(goes_on, before, total, survivors, rows, inside, N):
    """Writes the surviving rows to survivors [N] from position `before` (the number of survivors in
    earlier rows) on. Fills positions from `total` on with N."""
    at = before + tl.cumsum(goes_on, axis=0) - goes_on
    tl.store(survivors + at, rows, mask=inside & (goes_on != 0))
    tl.store(survivors + rows, rows * 0 + N, mask=inside & (rows >= total))


@triton.jit
def _scan(flags, counts, programs, survivors, count, N, ROWS: tl.constexpr, COUNTS: tl.constexpr):
    """Writes the survivors of ROWS rows, from the flags [N] and counts [programs] of `_finish`."""
    program = tl.program_id(0)
    before = tl.zeros([COUNTS], tl.int64)
    total = tl.zeros([COUNTS], tl.int64)
    bad = tl.zeros([COUNTS], tl.int32)
    for start in range(0, programs, COUNTS):
        which = start + tl.arange(0, COUNTS)
        n = tl.load(counts + which, mask=which < programs, other=0)
        total += n % BAD
        before += tl.where(which < program, n % BAD, 0)
        bad = tl.maximum(bad, n // BAD)
    all_rows = tl.sum(total, axis=0)
    rows = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    goes_on = tl.load(flags + rows, mask=inside, other=0).to(tl.int64)
    _write_survivors(goes_on, tl.sum(before, axis=0), all_rows, survivors, rows, inside, N)
    if program == 0:
        tl.store(count, tl.where(tl.max(bad, axis=0) > 0, -1, all_rows))


def finish(
    states: torch.Tensor,
    indices: torch.Tensor,
    threshold: torch.Tensor,
    temperature: torch.Tensor,
    criterion: int,
    target: torch.Tensor | None,
    C: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """confidence [N], prediction [N], survivors [N] and count [] from the states of N rows.

    count is -1 if a target is out of range.
    """
    splits, N = indices.shape
    if target is not None:
        row_state.check_vector(N, torch.int64, target=target)
    if threshold.dim() != 0:
        row_state.check_vector(C, states.dtype, threshold=threshold)
    confidence = states.new_empty(N)
    prediction, survivors = (indices.new_empty(N, dtype=torch.int64) for _ in range(2))
    count = indices.new_empty((), dtype=torch.int64)
    if N == 0:
        return confidence, prediction, survivors, count.zero_()
    if threshold.dim() == 1:
        t, kind = threshold, "classes"
    else:
        t, on_device = row_state.setting(threshold)
        kind = "pointer" if on_device else "value"
    T, T_is_pointer = row_state.setting(temperature)
    rows = min(ROWS, triton.next_power_of_2(N))
    programs = triton.cdiv(N, rows)
    one = programs == 1
    flags = None if one else indices.new_empty(N, dtype=torch.int8)
    counts = None if one else indices.new_empty(programs)
    _finish[(programs,)](
        states, indices, splits, splits * N, t, T, target, confidence, prediction, flags, counts,
        survivors, count, N, C, CRITERION=criterion,
        LARGER_IS_SURER=row_state.LARGER_IS_SURER[criterion], T_IS_POINTER=T_is_pointer,
        THRESHOLD=kind, HAS_TARGET=target is not None, ONE_PROGRAM=one, ROWS=rows,
        num_warps=row_state.warps(rows),
    )  # fmt: skip
    if not one:
        _scan[(programs,)](flags, counts, programs, survivors, count, N, ROWS=rows, COUNTS=1024)
    return confidence, prediction, survivors, count
