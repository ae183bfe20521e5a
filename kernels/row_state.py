"""The softmax state of a row, which kernels compute in parts and merge, and what kernel launches
share.

The state of a row over some of its classes:

    m      the largest logit; NaN if a logit was NaN
    index  the class of m, the lowest of equals (of NaN, the first)
    s      sum e, with e = exp((z - m) / T)
    u      margin: the second largest logit; entropy: sum e (z - m) / T; otherwise unused

The states of two groups of classes merge into the state of both. So a row can be split over loop
iterations, over programs, or both. The order of the merges is fixed, so the result is
deterministic. Where m is infinite, e is 1 for the classes with z = m and 0 for the others.
"""

import torch
import triton
import triton.language as tl

#: Codes of the exit criteria. They must equal the table in `elf_fast/criteria.py`: a test compares
#: names, codes and directions.
CONFIDENCE = tl.constexpr(0)
MARGIN = tl.constexpr(1)
ENTROPY = tl.constexpr(2)
#: By code: whether a larger statistic is surer.
LARGER_IS_SURER = {CONFIDENCE.value: True, MARGIN.value: True, ENTROPY.value: False}

#: A class index above all others.
NOWHERE = tl.constexpr(2**31 - 1)

#: Logits in a tile of several rows, and in a tile of one row.
TILE = 1024
ROW_TILE = 4096


@triton.jit
def relative(z, m, inverse_T):
    """x = (z - m) / T and exp(x). Where z = m, even if both are infinite, x is 0."""
    at_top = z == m
    x = tl.where(at_top, 0.0, (z - m) * inverse_T)
    return x, tl.where(at_top, 1.0, tl.exp(x))


@triton.jit
def tile_state(z, classes, inside, inverse_T, CRITERION: tl.constexpr):
    """States of the rows of a tile z [R, B] of `classes` [B], over the classes `inside` [B]."""
    nan = (z != z) & inside[None, :]
    first_nan = tl.min(tl.where(nan, classes[None, :], NOWHERE), axis=1)
    z = tl.where(inside[None, :] & (z == z), z, -float("inf"))
    m = tl.max(z, axis=1)
    index = tl.min(tl.where((z == m[:, None]) & inside[None, :], classes[None, :], NOWHERE), axis=1)
    x, e = relative(z, m[:, None], inverse_T)
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
    """State over no classes, with the shape [R] and dtype of `like`."""
    zero = tl.zeros(like.shape, like.dtype)
    lowest = zero - float("inf")
    u = zero
    if CRITERION == MARGIN:
        u = lowest
    return lowest, tl.full(like.shape, NOWHERE, tl.int32), zero, u


@triton.jit
def merge(m_a, index_a, s_a, u_a, m_b, index_b, s_b, u_b, inverse_T, CRITERION: tl.constexpr):
    """The state over the classes of a and of b. The classes of a must come before those of b."""
    nan_a = m_a != m_a
    nan_b = m_b != m_b
    m = tl.maximum(m_a, m_b)
    x_a, e_a = relative(m_a, m, inverse_T)
    x_b, e_b = relative(m_b, m, inverse_T)
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
    """Writes one split's states to `states` [3, splits, N] and `indices` [splits, N].

    plane: splits * N, the distance between m, s and u of a row.
    """
    at = split.to(tl.int64) * N + rows
    tl.store(states + at, m, mask=inside)
    tl.store(states + plane + at, s, mask=inside)
    tl.store(states + 2 * plane + at, u, mask=inside)
    tl.store(indices + at, index, mask=inside)


@triton.jit
def scalar(value, IS_POINTER: tl.constexpr):
    """A scalar setting, passed as a number or, if its value is in device memory, as a pointer."""
    if IS_POINTER:
        return tl.load(value)
    else:
        return value


@triton.jit
def inverse(temperature, IS_POINTER: tl.constexpr, like):
    """1 / T in the element type of the pointer `like`."""
    return 1.0 / (tl.zeros([], like.dtype.element_ty) + scalar(temperature, IS_POINTER))


def check_criterion(code: int) -> None:
    """Raises ValueError if no criterion has the code."""
    if code not in LARGER_IS_SURER:
        known = ", ".join(map(str, LARGER_IS_SURER))
        raise ValueError(f"criterion: expected one of the codes {known}, got {code}")


def setting(value: torch.Tensor):
    """The kernel argument for a setting [], and whether it is a pointer. It is a number for a CPU
    tensor, else the tensor itself: reading a number from the device would wait for the device."""
    return (float(value), False) if value.device.type == "cpu" else (value, True)


def tile(N: int, C: int) -> tuple[int, int]:
    """Rows and classes of a tile of logits [N, C]."""
    classes = min(ROW_TILE, triton.next_power_of_2(C))
    return max(1, min(triton.next_power_of_2(N), TILE // classes)), classes


def check_vector(
    n: int, dtype: torch.dtype, *, contiguous: bool = True, **vectors: torch.Tensor
) -> None:
    """Raises ValueError unless each of `vectors` is [n] of `dtype`.

    A kernel would read past the end of a shorter one.
    """
    for name, vector in vectors.items():
        fits = vector.shape == (n,) and vector.dtype == dtype
        if not fits or (contiguous and n > 1 and vector.stride(0) != 1):
            raise ValueError(
                f"{name}: expected a{' contiguous' if contiguous else ''} {dtype} [{n}], got "
                f"{vector.dtype} {list(vector.shape)} with strides {list(vector.stride())}"
            )


def vector_width(logits: torch.Tensor) -> int:
    """Logits in one vector load, which has up to 16 bytes.

    This is the largest power of two that divides the number of classes and the row stride. Kernels
    take both in units of it: Triton vectorises a load only if it can prove the alignment, which it
    infers from arguments divisible by 16, and 1000 classes are not.
    """
    if logits.stride(1) != 1:
        return 1
    bits = logits.shape[1] | logits.stride(0) | (16 // logits.element_size())
    return bits & -bits


def empty_states(splits: int, N: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised states of N rows in `splits` parts each; layout as in `store_state`."""
    states = like.new_empty((3, splits, N), dtype=arithmetic(like))
    return states, like.new_empty((splits, N), dtype=torch.int32)


def arithmetic(x: torch.Tensor) -> torch.dtype:
    """The dtype of the arithmetic on x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def warps(elements: int, each: int = 4) -> int:
    """Warps (1 to 8) for a tile, so that a thread has at least `each` elements if possible."""
    return max(1, min(8, elements // (32 * each)))
