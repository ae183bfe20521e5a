"""compact: dense batches of the surviving samples of features [N, ...], and the gradient.

    compact           out[k] = features[survivors[k]]: 2 s F bytes
    compact_into      the same into a given batch, for the first `count` survivors; count is in
                      device memory
    compact_          features[j] = old features[order[j]] for j < n. Survivors with indices >= n
                      move into the free rows below n: about 2 s (1 - s) F bytes
    compact_backward  out[survivors[k]] = grad[k], 0 elsewhere: (1 + s) F bytes

Here n is the number of survivors, s = n / N and F the bytes of the features. A sample is one block
of memory in either memory format, and is copied as words of up to 8 bytes. One program copies PIECE
words of one row. It finds the row's rank among the survivors by bisection, so no inverse index map
is needed. A survivor outside [0, N) stops the kernel with an assertion, as in PyTorch's indexing.
Deterministic: each word is written by one program.
"""

import torch
import triton
import triton.language as tl

#: Words that one program copies.
PIECE = 1024


@triton.jit
def _row_and_words(pieces, PIECE: tl.constexpr):
    """The row of a program, and the words of the row that it copies."""
    program = tl.program_id(0)
    piece = (program % pieces).to(tl.int64)
    return (program // pieces).to(tl.int64), piece * PIECE + tl.arange(0, PIECE)


@triton.jit
def _rank(survivors, n, row):
    """How many of the first n survivors are below `row`. Survivors ascend."""
    low = n * 0
    high = n
    while low < high:
        middle = (low + high) // 2
        if tl.load(survivors + middle) < row:
            low = middle + 1
        else:
            high = middle
    return low


@triton.jit
def _number(count, n, HAS_COUNT: tl.constexpr):
    """The number of valid survivors: n, or `count` if given."""
    number = tl.zeros([], tl.int64) + n
    if HAS_COUNT:
        number = tl.minimum(tl.load(count), number)
    return number


@triton.jit
def _gather(
    source, source_pitch, out, out_pitch, words, pieces, survivors, count, n, N,
    HAS_COUNT: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    k, at = _row_and_words(pieces, PIECE)
    if k < _number(count, n, HAS_COUNT):
        row = tl.load(survivors + k)
        valid = (row >= 0) & (row < N)
        tl.device_assert(valid, "survivors: expected indices in [0, N)")
        inside = (at < words) & valid
        tl.store(out + k * out_pitch + at, tl.load(source + row * source_pitch + at, mask=inside),
                 mask=inside)  # fmt: skip


@triton.jit
def _fill_holes(
    batch, pitch, words, pieces, survivors, count, order, n, N,
    HAS_COUNT: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    j, at = _row_and_words(pieces, PIECE)
    number = _number(count, n, HAS_COUNT)
    source = j * 0 + N
    if j < number:
        below = _rank(survivors, number, j)
        source = tl.load(survivors + below)
        if source != j:
            # Row j is the (j - below)-th free row. It takes the survivor of that rank among those
            # with indices >= number.
            rank = _rank(survivors, number, number) + j - below
            source = tl.load(survivors + tl.minimum(rank, number - 1))
            valid = (source >= number) & (source < N)
            tl.device_assert(valid, "survivors: expected ascending indices in [0, N)")
            inside = (at < words) & valid
            tl.store(batch + j * pitch + at, tl.load(batch + source * pitch + at, mask=inside),
                     mask=inside)  # fmt: skip
    if tl.program_id(0) % pieces == 0:
        tl.store(order + j, source)


@triton.jit
def _scatter(
    grad, grad_pitch, out, out_pitch, words, pieces, survivors, n, PIECE: tl.constexpr
):  # fmt: skip
    row, at = _row_and_words(pieces, PIECE)
    k = _rank(survivors, row * 0 + n, row)
    found = k < n
    if found:
        found = tl.load(survivors + k) == row
    inside = at < words
    value = tl.load(grad + k * grad_pitch + at, mask=inside & found, other=0)
    tl.store(out + row * out_pitch + at, value, mask=inside)


def _is_dense(x: torch.Tensor) -> bool:
    """Whether every sample of x is one block of memory."""
    if 0 in x.shape[1:]:
        return True
    inner = sorted((st, sz) for st, sz in zip(x.stride()[1:], x.shape[1:], strict=True) if sz != 1)
    expected = 1
    for stride, size in inner:
        if stride != expected:
            return False
        expected *= size
    return True


def _empty_batch(like: torch.Tensor, rows: int) -> torch.Tensor:
    """A batch [rows, ...] of samples laid out like those of `like`, without gaps between them."""
    return torch.empty_strided(
        (rows, *like.shape[1:]),
        (max(1, like.shape[1:].numel()), *like.stride()[1:]),
        dtype=like.dtype,
        device=like.device,
    )


def _as_words(*batches: torch.Tensor):
    """Each batch as a pointer to words and its pitch (words from one sample to the next); then the
    words and the pieces per row. The batches hold dense samples of equal shape."""
    size = batches[0].element_size()
    sample = batches[0].shape[1:].numel() * size
    apart = [x.stride(0) * size for x in batches]
    bits = sample | 8
    for x, pitch in zip(batches, apart, strict=True):
        bits |= x.data_ptr() | pitch
    width = bits & -bits  # the largest power of two that divides them all, at most 8
    word = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}[width]
    args: list = []
    for x, pitch in zip(batches, apart, strict=True):
        args += [triton.reinterpret(x, word), pitch // width]
    return *args, sample // width, triton.cdiv(sample // width, PIECE)


def _check(batch: torch.Tensor, survivors: torch.Tensor, count: torch.Tensor | None) -> int:
    """Checks the arguments and returns n."""
    if survivors.dtype != torch.int64 or survivors.dim() != 1 or not survivors.is_contiguous():
        raise ValueError(
            f"survivors: expected contiguous int64 [n], got {survivors.dtype} "
            f"{list(survivors.shape)}"
        )
    if count is not None and (count.dtype != torch.int64 or count.numel() != 1):
        raise ValueError(f"count: expected one int64, got {count.dtype} {list(count.shape)}")
    if batch.dim() < 1 or not _is_dense(batch):
        raise ValueError("features: expected [N, ...] with every sample dense in memory")
    return survivors.shape[0]


def compact(features: torch.Tensor, survivors: torch.Tensor) -> torch.Tensor:
    source = features if _is_dense(features) else features.contiguous()
    out = _empty_batch(source, survivors.shape[0])
    compact_into(out, source, survivors, None)
    return out


def compact_into(
    out: torch.Tensor,  # [>= n, ...], dense samples in the memory format of `features`
    features: torch.Tensor,  # [N, ...]
    survivors: torch.Tensor,  # [n]
    count: torch.Tensor | None,  # []
) -> None:
    n = _check(features, survivors, count)
    if (
        out.dtype != features.dtype
        or out.shape[1:] != features.shape[1:]
        or out.stride()[1:] != features.stride()[1:]
        or out.shape[0] < n
    ):
        raise ValueError(
            f"out: expected at least {n} samples of the features' shape, dtype and memory format"
        )
    words = _as_words(features, out)
    if n and words[-1]:
        _gather[(n * words[-1],)](
            *words, survivors, count, n, features.shape[0], HAS_COUNT=count is not None,
            PIECE=PIECE, debug=True,
        )  # fmt: skip


def compact_(
    features: torch.Tensor, survivors: torch.Tensor, count: torch.Tensor | None
) -> torch.Tensor:
    n = _check(features, survivors, count)
    if features.shape[0] > 1 and features.stride(0) < features.shape[1:].numel():
        raise ValueError("features: expected samples that do not share memory")
    order = torch.empty_like(survivors)
    *words, pieces = _as_words(features)
    pieces = max(1, pieces)
    if n:
        _fill_holes[(n * pieces,)](
            *words, pieces, survivors, count, order, n, features.shape[0],
            HAS_COUNT=count is not None, PIECE=PIECE, debug=True,
        )  # fmt: skip
    return order


def compact_backward(grad: torch.Tensor, survivors: torch.Tensor, rows: int) -> torch.Tensor:
    grad = grad if _is_dense(grad) else grad.contiguous()
    if _check(grad, survivors, None) != grad.shape[0]:
        raise ValueError(f"grad: expected {survivors.shape[0]} rows, got {grad.shape[0]}")
    out = _empty_batch(grad, rows)
    words = _as_words(grad, out)
    if rows and words[-1]:
        _scatter[(rows * words[-1],)](*words, survivors, survivors.shape[0], PIECE=PIECE)
    return out
