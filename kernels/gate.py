"""What the row kernels share: softmax statistics that can be taken tile by tile, the confidence
test, and the survivors.

The state of a row over some of its classes, in the order of the classes:

    m      largest logit; NaN once a logit was NaN
    index  its class, the lowest of equals (of a NaN, the first)
    s      sum e, with e = exp((z - m) / T)
    u      margin: the second largest logit; entropy: sum e (z - m) / T; otherwise unused

States of neighbouring classes merge into one, so a row may be split over loop iterations, over
programs, or both; the order of merging is fixed, and with it every bit of the result. An infinite m
takes all mass, evenly over ties: e = 1 where z = m, whatever their difference says.
"""

import torch
import triton
import triton.language as tl

CONFIDENCE = tl.constexpr(0)
MARGIN = tl.constexpr(1)
ENTROPY = tl.constexpr(2)

#: A class index above all others.
NOWHERE = tl.constexpr(2**31 - 1)

#: Logits in a tile of several rows, and in one of a single row.
TILE = 1024
ROW_TILE = 4096

#: Rows that one program of `_finish` tests, at most.
ROWS = 1024

#: Added to a program's number of survivors if one of its targets was out of range.
BAD = tl.constexpr(2**20)


@triton.jit
def _relative(z, m, inverse_T):
    """((z - m) / T, its exponential); 0 and 1 where z = m, infinite or not."""
    at_top = z == m
    x = tl.where(at_top, 0.0, (z - m) * inverse_T)
    return x, tl.where(at_top, 1.0, tl.exp(x))


@triton.jit
def tile_state(z, classes, inside, inverse_T, CRITERION: tl.constexpr):
    """State of the rows of a tile z [R, B] of `classes` [B], of which those `inside` [B] count."""
    nan = (z != z) & inside[None, :]
    first_nan = tl.min(tl.where(nan, classes[None, :], NOWHERE), axis=1)
    z = tl.where(inside[None, :] & (z == z), z, -float("inf"))
    m = tl.max(z, axis=1)
    index = tl.min(tl.where((z == m[:, None]) & inside[None, :], classes[None, :], NOWHERE), axis=1)
    x, e = _relative(z, m[:, None], inverse_T)
    e = tl.where(inside[None, :], e, 0.0)
    s = tl.sum(e, axis=1)
    u = s
    if CRITERION == MARGIN:
        u = tl.max(tl.where(classes[None, :] == index[:, None], -float("inf"), z), axis=1)
    elif CRITERION == ENTROPY:
        u = tl.sum(tl.where(e > 0, e * x, 0.0), axis=1)
    has_nan = first_nan < NOWHERE
    return tl.where(has_nan, float("nan"), m), tl.where(has_nan, first_nan, index), s, u


@triton.jit
def no_state(like, CRITERION: tl.constexpr):
    """State over no classes, for rows [R] as `like`."""
    zero = tl.zeros(like.shape, like.dtype)
    lowest = zero - float("inf")
    u = zero
    if CRITERION == MARGIN:
        u = lowest
    return lowest, tl.full(like.shape, NOWHERE, tl.int32), zero, u


@triton.jit
def merge(m_a, index_a, s_a, u_a, m_b, index_b, s_b, u_b, inverse_T, CRITERION: tl.constexpr):
    """The state over the classes of a and, after them, those of b."""
    nan_a = m_a != m_a
    nan_b = m_b != m_b
    m = tl.maximum(m_a, m_b)
    x_a, e_a = _relative(m_a, m, inverse_T)
    x_b, e_b = _relative(m_b, m, inverse_T)
    s = e_a * s_a + e_b * s_b
    u = s
    if CRITERION == MARGIN:
        u = tl.maximum(tl.maximum(u_a, u_b), tl.minimum(m_a, m_b))
    elif CRITERION == ENTROPY:
        u = tl.where(e_a > 0, e_a * (u_a + x_a * s_a), 0.0)
        u += tl.where(e_b > 0, e_b * (u_b + x_b * s_b), 0.0)
    index = tl.where((m_b > m_a) | (index_a == NOWHERE), index_b, index_a)
    index = tl.where(nan_a, index_a, tl.where(nan_b, index_b, index))
    return tl.where(nan_a | nan_b, float("nan"), m), index, s, u


@triton.jit
def store_state(m, index, s, u, states, indices, rows, inside, split, plane, N):
    """Writes states [3, splits, N], of `plane` = splits N, and their indices [splits, N]."""
    at = split.to(tl.int64) * N + rows
    tl.store(states + at, m, mask=inside)
    tl.store(states + plane + at, s, mask=inside)
    tl.store(states + 2 * plane + at, u, mask=inside)
    tl.store(indices + at, index, mask=inside)


@triton.jit
def scalar(value, IS_POINTER: tl.constexpr):
    """A setting that came as a number or, where only the device knows it, as a pointer."""
    if IS_POINTER:
        return tl.load(value)
    else:
        return value


@triton.jit
def inverse(temperature, IS_POINTER: tl.constexpr, like):
    """1 / T in the dtype that the pointer `like` points to."""
    return 1.0 / (tl.zeros([], like.dtype.element_ty) + scalar(temperature, IS_POINTER))


@triton.jit
def _statistic(m, s, u, C, inverse_T, CRITERION: tl.constexpr):
    value = 1.0 / s
    if CRITERION == MARGIN:
        _, second = _relative(u, m, inverse_T)
        value = tl.where(C == 1, 1.0, (1.0 - second) / s)
    elif CRITERION == ENTROPY:
        classes = tl.maximum(C, 2).to(s.dtype)
        value = tl.where(C == 1, 0.0, (tl.log(s) - u / s) / tl.log(classes))
    return tl.where(m != m, float("nan"), value)


@triton.jit
def _finish(
    states, indices, splits, plane, threshold, temperature, target, confidence, prediction, flags,
    counts, survivors, count, N, C,
    CRITERION: tl.constexpr, T_IS_POINTER: tl.constexpr, THRESHOLD: tl.constexpr,
    HAS_TARGET: tl.constexpr, ONE_PROGRAM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Confidence, prediction and test of ROWS rows from their states; with ONE_PROGRAM the
    survivors as well, else their flags and number (plus BAD if a target was out of range).

    THRESHOLD: "value", "pointer" to one, or "classes" (one per class).
    """
    program = tl.program_id(0)
    rows = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    inverse_T = inverse(temperature, T_IS_POINTER, states)
    first = tl.load(states + rows, mask=inside, other=0.0)
    m, index, s, u = no_state(first, CRITERION)
    at = rows
    for _ in range(0, splits):
        m_b = tl.load(states + at, mask=inside, other=0.0)
        s_b = tl.load(states + plane + at, mask=inside, other=1.0)
        u_b = tl.load(states + 2 * plane + at, mask=inside, other=0.0)
        index_b = tl.load(indices + at, mask=inside, other=0)
        m, index, s, u = merge(m, index, s, u, m_b, index_b, s_b, u_b, inverse_T, CRITERION)
        at += N
    value = _statistic(m, s, u, C, inverse_T, CRITERION)
    if THRESHOLD == "classes":
        t = tl.load(threshold + index, mask=inside, other=0.0)
    else:
        t = scalar(threshold, THRESHOLD == "pointer")
    leaves = value >= t
    if CRITERION == ENTROPY:
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
        _place(goes_on, n * 0, n, survivors, rows, inside, N)
        tl.store(count, tl.where(bad > 0, -1, n).to(tl.int64))
    else:
        tl.store(flags + rows, goes_on.to(tl.int8), mask=inside)
        tl.store(counts + program, n + bad * BAD)


@triton.jit
def _place(goes_on, before, total, survivors, rows, inside, N):
    """Writes the rows that go on behind the `before` survivors of earlier rows; whatever of
    survivors [N] lies past the `total` is filled with N."""
    at = before + tl.cumsum(goes_on, axis=0) - goes_on
    tl.store(survivors + at, rows, mask=inside & (goes_on != 0))
    tl.store(survivors + rows, rows * 0 + N, mask=inside & (rows >= total))


@triton.jit
def _scan(flags, counts, programs, survivors, count, N, ROWS: tl.constexpr, COUNTS: tl.constexpr):
    """Survivors of ROWS rows from the flags [N] and the number of them [programs] that each
    program of `_finish` found."""
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
    _place(goes_on, tl.sum(before, axis=0), all_rows, survivors, rows, inside, N)
    if program == 0:
        tl.store(count, tl.where(tl.max(bad, axis=0) > 0, -1, all_rows))


def setting(value: torch.Tensor):
    """A setting [] as a kernel takes it: its number if the host knows it, else the tensor. Reading
    a number from the device would wait for it."""
    return (float(value), False) if value.device.type == "cpu" else (value, True)


def tile(N: int, C: int) -> tuple[int, int]:
    """Rows and classes of the tiles of logits [N, C]."""
    classes = min(ROW_TILE, triton.next_power_of_2(C))
    return max(1, min(triton.next_power_of_2(N), TILE // classes)), classes


def check_vector(
    n: int, dtype: torch.dtype, *, contiguous: bool = True, **vectors: torch.Tensor
) -> None:
    """Each of `vectors` must be [n] of `dtype`: a kernel would read past the end of a shorter."""
    for name, vector in vectors.items():
        fits = vector.shape == (n,) and vector.dtype == dtype
        if not fits or (contiguous and n > 1 and vector.stride(0) != 1):
            raise ValueError(
                f"{name}: expected a{' contiguous' if contiguous else ''} {dtype} [{n}], got "
                f"{vector.dtype} {list(vector.shape)} with strides {list(vector.stride())}"
            )


def vector(logits: torch.Tensor) -> int:
    """Logits that one load may take at once, up to 16 bytes: the largest power of two that divides
    the classes and the distance between rows. Kernels take both in these units, because the
    compiler sees no alignment in 1000 classes, which are no multiple of 16."""
    if logits.stride(1) != 1:
        return 1
    bits = logits.shape[1] | logits.stride(0) | (16 // logits.element_size())
    return bits & -bits


def empty_states(splits: int, N: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the states of N rows, each split `splits` times: see `store_state`."""
    states = like.new_empty((3, splits, N), dtype=arithmetic(like))
    return states, like.new_empty((splits, N), dtype=torch.int32)


def arithmetic(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def finish(
    states: torch.Tensor,
    indices: torch.Tensor,
    threshold: torch.Tensor,
    temperature: torch.Tensor,
    criterion: int,
    target: torch.Tensor | None,
    C: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """confidence [N], prediction [N], survivors [N] and count [] from the states of N rows."""
    splits, N = indices.shape
    if target is not None:
        check_vector(N, torch.int64, target=target)
    if threshold.dim() != 0:
        check_vector(C, states.dtype, threshold=threshold)
    confidence = states.new_empty(N)
    prediction, survivors = (indices.new_empty(N, dtype=torch.int64) for _ in range(2))
    count = indices.new_empty((), dtype=torch.int64)
    if N == 0:
        return confidence, prediction, survivors, count.zero_()
    if threshold.dim() == 1:
        t, kind = threshold, "classes"
    else:
        t, on_device = setting(threshold)
        kind = "pointer" if on_device else "value"
    T, T_is_pointer = setting(temperature)
    rows = min(ROWS, triton.next_power_of_2(N))
    programs = triton.cdiv(N, rows)
    one = programs == 1
    flags = None if one else indices.new_empty(N, dtype=torch.int8)
    counts = None if one else indices.new_empty(programs)
    _finish[(programs,)](
        states, indices, splits, splits * N, t, T, target, confidence, prediction, flags, counts,
        survivors, count, N, C, CRITERION=criterion, T_IS_POINTER=T_is_pointer, THRESHOLD=kind,
        HAS_TARGET=target is not None, ONE_PROGRAM=one, ROWS=rows, num_warps=warps(rows),
    )  # fmt: skip
    if not one:
        _scan[(programs,)](flags, counts, programs, survivors, count, N, ROWS=rows, COUNTS=1024)
    return confidence, prediction, survivors, count


def warps(elements: int, each: int = 4) -> int:
    """Warps, 1 to 8, for a tile of which a thread takes `each` elements at least."""
    return max(1, min(8, elements // (32 * each)))
