"""Every operator against the reference, over the case table and every backend."""

from __future__ import annotations

import math

import pytest
import torch
from cases import (
    DTYPES,
    FEATURES,
    LOSS_SHAPES,
    LOSSES,
    assert_as_accurate,
    features,
    gate_cases,
)
from torch import Tensor

from elf_fast import criteria, functional, ops, reference

nan, inf = math.nan, math.inf


def to_double(kwargs: dict) -> dict:
    return {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in kwargs.items()
    }


def assert_same_gate(gate, truth, threshold, criterion: str) -> None:
    """Same predictions; same survivors but where the statistic is within 1e-6 of the threshold
    (relative; absolute for the entropy, whose own rounding is absolute)."""
    gate, truth = (reference.ExitGate(*(x.cpu() for x in g)) for g in (gate, truth))
    threshold = threshold.cpu() if isinstance(threshold, Tensor) else threshold
    assert torch.equal(gate.prediction, truth.prediction)
    N = len(gate.prediction)
    goes_on = torch.zeros(N, dtype=torch.bool)
    expected = goes_on.clone()
    goes_on[gate.survivors] = True
    expected[truth.survivors] = True
    t = threshold[truth.prediction] if isinstance(threshold, Tensor) else torch.tensor(threshold)
    t = t.double().expand(N)
    size = t.abs() if criteria.by_name(criterion).larger_is_surer else torch.ones_like(t)
    tie = (truth.confidence.double() - t).abs() <= 1e-6 * size
    assert torch.equal(goes_on[~tie], expected[~tie])
    assert bool((gate.survivors[1:] > gate.survivors[:-1]).all())


@pytest.mark.parametrize("case", list(gate_cases()), ids=str)
def test_exit_gate(case, device):
    kwargs = case.make(device)
    gate = functional.exit_gate(**kwargs)
    truth = reference.exit_gate(**to_double(kwargs))
    same = reference.exit_gate(**kwargs)
    acc = torch.float64 if case.dtype == torch.float64 else torch.float32
    assert gate.confidence.dtype == acc
    assert_as_accurate(gate.confidence, same.confidence, truth.confidence, 1e-6)
    assert_same_gate(gate, truth, kwargs["threshold"], case.criterion)


@pytest.mark.parametrize("case", [c for c in gate_cases() if c.criterion == "confidence"], ids=str)
def test_early_stop_decides_the_same(case, device):
    kwargs = case.make(device)
    logits = kwargs["logits"]
    acc = torch.float64 if case.dtype == torch.float64 else torch.float32
    t = torch.as_tensor(kwargs["threshold"], dtype=torch.float32).to(acc)
    T = torch.tensor(case.temperature, dtype=acc)
    full = ops.exit_gate(logits, t, T, 0, kwargs["target"], False)
    early = ops.exit_gate(logits, t, T, 0, kwargs["target"], True)
    for a, b in zip(full[1:], early[1:], strict=True):
        assert torch.equal(a, b)
    exits = torch.ones(len(logits), dtype=torch.bool, device=device)
    exits[full[2][: int(full[3])]] = False
    torch.testing.assert_close(early[0][exits], full[0][exits], rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [3, 40, 70, 200])
def test_ties_take_the_lowest_class(C, dtype, device):
    """Wherever the maxima stand: side by side, a vector or a block apart, at the end of the row.
    Zeros of either sign are equal."""
    logits = torch.full((40, C), -1.0)
    first = torch.arange(40) % C
    for n, c in enumerate(first.tolist()):
        logits[n, c :: (1, 16, 32, 64)[n // 10]] = 2.0
    zeros = torch.where(logits == 2.0, -0.0, -1.0)
    zeros[:, -1] = 0.0
    for values in (logits, zeros):
        for criterion in criteria.TABLE:
            gate = functional.exit_gate(values.to(device, dtype), 0.5, criterion=criterion)
            assert torch.equal(gate.prediction.cpu(), first)


def test_many_equal_terms_add_up(device, request):
    """Each is rounded to the same side: torch.softmax, and the reference, are off by 7e-6."""
    rtol = 1e-5 if request.node.callspec.params["device"][0] == "torch" else 1e-6
    logits = torch.linspace(-3.0, 0.0, 6)[:, None].repeat(1, 8142)
    logits[:, 0] = 0.0
    gate = functional.exit_gate(logits.to(device), 0.5)
    expected = reference.statistic(logits.double())
    torch.testing.assert_close(gate.confidence.double().cpu(), expected, rtol=rtol, atol=0)


SPECIAL = [  # row, max probability, prediction
    ([0.0, nan, 1.0], nan, 1),
    ([nan, nan, nan], nan, 0),
    ([inf, nan, 0.0], nan, 1),
    ([inf, 0.0, 0.0], 1.0, 0),
    ([0.0, inf, inf], 0.5, 1),
    ([-inf, -inf, -inf], 1 / 3, 0),
    ([-inf, 0.0, -inf], 1.0, 1),
    ([-inf, 0.0, 0.0], 0.5, 1),
    ([1e30, -1e30, 0.0], 1.0, 0),
    ([3e38, 3e38, -3e38], 0.5, 0),
    ([0.0, 0.0, 0.0], 1 / 3, 0),
    ([-1e4, 0.0, 1e4], 1.0, 2),
]


@pytest.mark.parametrize("padding", [0, 5, 61, 200])
@pytest.mark.parametrize("row, top, prediction", SPECIAL, ids=lambda v: str(v))
def test_special_values(row, top, prediction, padding, device):
    """NaN, infinite and huge logits follow softmax's limits, wherever in a row they stand."""
    logits = torch.tensor([row + [-inf] * padding, [0.0, 5.0, 1.0] + [0.0] * padding])
    gate = functional.exit_gate(logits.to(device), 0.0)
    expected = reference.statistic(logits.double())
    if row != [-inf] * 3 or padding == 0:  # an all -inf row is uniform over the padding, too
        assert expected[0].item() == pytest.approx(top, nan_ok=True)
    torch.testing.assert_close(
        gate.confidence.double().cpu(), expected, rtol=1e-6, atol=1e-12, equal_nan=True
    )
    assert gate.prediction[0] == prediction
    assert gate.survivors.tolist() == ([0] if top != top else [])
    for criterion in set(criteria.TABLE) - {"confidence"}:
        gate = functional.exit_gate(logits.to(device), 0.5, criterion=criterion)
        expected = reference.statistic(logits.double(), criterion=criterion)
        torch.testing.assert_close(
            gate.confidence.double().cpu(), expected, rtol=1e-5, atol=1e-6, equal_nan=True
        )


@pytest.mark.parametrize("criterion", criteria.TABLE.values(), ids=lambda c: c.name)
def test_nan_never_exits(criterion, device):
    logits = torch.randn(50, 100, device=device)
    logits[torch.arange(0, 50, 7), torch.arange(0, 50, 7) * 2] = nan
    gate = functional.exit_gate(logits, criterion.everyone, criterion=criterion.name)
    assert gate.survivors.tolist() == list(range(0, 50, 7))
    assert gate.confidence.isnan().nonzero().flatten().tolist() == list(range(0, 50, 7))


@pytest.mark.parametrize("C", [2, 40, 1000])
def test_wide_rows_survive_a_bad_first_guess(C, device):
    """Rows whose maximum lies far above their first values: the fast pass overflows."""
    logits = torch.full((4, C), -200.0, device=device)
    logits[:, C - 1] = torch.tensor([0.0, 500.0, 3e4, -199.0])
    gate = functional.exit_gate(logits, 0.5)
    expected = reference.statistic(logits.double())
    torch.testing.assert_close(gate.confidence.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", LOSS_SHAPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_exit_loss(name, C, dtype, device):
    N, C = C
    generator = torch.Generator().manual_seed(N * C)
    logits = (torch.randn(N, C, generator=generator) * 4).to(dtype).to(device)
    target = torch.randint(0, C, (N,), generator=generator).to(device)
    target[::2] = logits[::2].argmax(dim=1)
    kwargs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in LOSSES[name](C).items()}
    grad = torch.linspace(-1, 2, N, device=device)

    def run(function, z, settings):
        z = z.detach().requires_grad_()
        out = function(z, target, threshold=0.5, **settings)
        (out.loss * grad).sum().backward()
        return out, z.grad

    out, z_grad = run(functional.exit_loss, logits, kwargs)
    truth, true_grad = run(reference.exit_loss, logits.double(), to_double(kwargs))
    same, same_grad = run(reference.exit_loss, logits, kwargs)
    assert_as_accurate(out.loss.detach(), same.loss.detach(), truth.loss.detach(), 1e-6, 1.0)
    rounding = torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 1e-6
    assert_as_accurate(z_grad, same_grad, true_grad, rounding, 1.0)
    assert_same_gate(
        reference.ExitGate(*out[1:]), reference.ExitGate(*truth[1:]), 0.5, "confidence"
    )


def test_exit_loss_of_infinite_logits_is_that_of_log_softmax(device):
    logits = torch.tensor([[0.0, -inf, 1.0], [0.0, nan, 1.0], [inf, 0.0, 0.0]], device=device)
    for y in range(3):
        target = torch.full((3,), y, device=device)
        out = functional.exit_loss(logits, target).loss
        expected = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        torch.testing.assert_close(out, expected, equal_nan=True)


#: Backends whose kernel of the loss checks targets before it uses them.
REFUSE_AT_ONCE = ("torch", "cpu", "emulated cuda")


def test_exit_loss_of_a_target_out_of_range_is_refused_or_nan_by_backend(device, request):
    """Without a gate Triton gives NaN, because raising would need a wait for the GPU."""
    logits = torch.randn(3, 4, device=device)
    target = torch.tensor([0, 7, 1], device=device)
    if request.node.callspec.params["device"][0] in REFUSE_AT_ONCE:
        with pytest.raises(ValueError, match="target: expected 0 <= target < 4"):
            functional.exit_loss(logits, target)
    else:
        out = functional.exit_loss(logits, target)
        assert out.loss.isnan().tolist() == [False, True, False]
        assert out.survivors.tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, channels_last", FEATURES, ids=str)
def test_exit_head(shape, channels_last, dtype, device):
    x = features(shape, channels_last, dtype).to(device)
    D, C = shape[2 if len(shape) == 3 else 1], 12
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(C, D, generator=generator).to(dtype).to(device)
    bias = torch.randn(C, generator=generator).to(dtype).to(device)
    for b in (bias, None):
        args = [t.detach().requires_grad_() for t in (x, weight, b) if t is not None]
        wide = [t.detach().double().requires_grad_() for t in args]
        same = [t.detach().requires_grad_() for t in args]
        tail = [] if b is not None else [None]
        out = functional.exit_head(*args, *tail, 0.5)
        truth = reference.exit_head(*wide, *tail, 0.5)
        plain = reference.exit_head(*same, *tail, 0.5)
        rounding = torch.finfo(dtype).eps
        assert_as_accurate(out.logits.detach(), plain.logits.detach(), truth.logits.detach(),
                           max(rounding, 1e-6) * 2)  # fmt: skip
        gate = reference.exit_gate(out.logits.detach(), 0.5)
        assert torch.equal(out.prediction, gate.prediction)
        assert torch.equal(out.survivors, gate.survivors)
        seed = torch.randn(out.logits.shape, generator=generator).to(device)
        out.logits.backward(seed.to(dtype))
        truth.logits.backward(seed.double())
        plain.logits.backward(seed.to(dtype))
        for mine, exact, same_dtype in zip(args, wide, same, strict=True):
            assert_as_accurate(mine.grad, same_dtype.grad, exact.grad, max(rounding, 1e-6) * 4)
        assert args[0].grad.stride() == x.stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "N, D, C", [(1, 1, 1), (5, 37, 9), (7, 16, 5), (2, 130, 3), (70, 300, 110)]
)
def test_exit_head_of_vectors_is_a_product(N, D, C, dtype, device):
    """The last product is large enough for a library; strided arguments always go there."""
    generator = torch.Generator().manual_seed(N)
    x, weight, bias = (
        torch.randn(*size, generator=generator).to(dtype).to(device)
        for size in ((N, D), (C, D), (C,))
    )
    strided = weight.repeat_interleave(2, 1)[:, ::2], bias.repeat_interleave(2)[::2]
    turned = x.T.contiguous().T
    for features_, w, b in ((x, weight, bias), (x, *strided), (turned, weight, None)):
        plain = torch.nn.functional.linear(x, weight, b if b is None else bias)
        exact = torch.nn.functional.linear(*(t if t is None else t.double() for t in (x, w, b)))
        out = functional.exit_head(features_, w, b, 0.5)
        assert_as_accurate(out.logits, plain, exact, max(torch.finfo(dtype).eps, 1e-6) * 2)


def test_exit_head_adds_an_infinite_weight_once(device):
    x, weight = torch.ones(3, 37, device=device), torch.zeros(2, 37, device=device)
    x[0, 30] = 0
    weight[1, 30] = inf
    logits = functional.exit_head(x, weight, None, 0.5).logits
    assert logits[0, 1].isnan() and logits[1:, 1].isposinf().all() and (logits[:, 0] == 0).all()


SURVIVORS = {
    "none": lambda N: [],
    "all": lambda N: list(range(N)),
    "first": lambda N: [0],
    "last": lambda N: [N - 1],
    "even": lambda N: list(range(0, N, 2)),
    "tail": lambda N: list(range(N // 2, N)),
}


@pytest.mark.parametrize("kept", SURVIVORS)
@pytest.mark.parametrize("shape, channels_last", FEATURES, ids=str)
def test_compact(shape, channels_last, kept, device):
    survivors = torch.tensor(SURVIVORS[kept](shape[0]), dtype=torch.int64, device=device)
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.uint8):
        x = (features(shape, channels_last, torch.float32) * 100).to(dtype).to(device)
        out = functional.compact(x, survivors)
        assert torch.equal(out, x[survivors])
        if channels_last and out.shape[0]:
            assert out.is_contiguous(memory_format=torch.channels_last)
    x = features(shape, channels_last, torch.float32).to(device).requires_grad_()
    functional.compact(x, survivors).pow(2).sum().backward()
    expected = torch.zeros_like(x)
    expected[survivors] = 2 * x.detach()[survivors]
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("view", ["transposed", "sliced", "expanded"])
def test_compact_of_views(view, device):
    x = torch.randn(8, 6, 10, device=device)
    x = {"transposed": x.mT, "sliced": x[:, 1:4, ::2], "expanded": x[:, :, :1].expand(8, 6, 4)}[
        view
    ]
    survivors = torch.tensor([1, 2, 7], device=device)
    assert torch.equal(functional.compact(x, survivors), x[survivors])


@pytest.mark.parametrize("kept", SURVIVORS)
@pytest.mark.parametrize("shape, channels_last", FEATURES, ids=str)
def test_compact_in_place_moves_only_what_must(shape, channels_last, kept, device):
    """Rows below n that survive stay, the tail's survivors fill the holes, nothing else is written:
    2 bytes moved for each byte of a survivor of the tail (design: about 2 s (1 - s) F)."""
    before = features(shape, channels_last, torch.float32).to(device)
    x = before.clone(memory_format=torch.preserve_format)
    survivors = torch.tensor(SURVIVORS[kept](shape[0]), dtype=torch.int64, device=device)
    n = len(survivors)
    order = functional.compact_(x, survivors)
    assert sorted(order.tolist()) == survivors.tolist()
    assert torch.equal(x[:n], before[order])
    assert torch.equal(x[n:], before[n:])
    moved = int((order != torch.arange(n, device=device)).sum())
    assert moved == int((survivors >= n).sum())


def test_compact_of_samples_without_elements(device):
    """Nothing is moved, and the order is still returned."""
    x, survivors = torch.empty(4, 0, 3, device=device), torch.tensor([1, 3], device=device)
    assert functional.compact(x, survivors).shape == (2, 0, 3)
    assert sorted(functional.compact_(x, survivors).tolist()) == [1, 3]


@pytest.mark.parametrize("n", [65_535, 65_536, 200_003])
def test_compact_of_long_samples(n, device):
    """On the CPU, threads share the samples in pieces of 64 KB."""
    before = torch.randint(0, 256, (7, n), dtype=torch.uint8, device=device)
    survivors = torch.tensor([0, 3, 4, 6], device=device)
    assert torch.equal(functional.compact(before, survivors), before[survivors])
    x = before.clone()
    order = functional.compact_(x, survivors)
    assert torch.equal(x[:4], before[order]) and torch.equal(x[4:], before[4:])


@pytest.mark.parametrize("n", [0, 1, 5, 8])
@pytest.mark.parametrize("shape, channels_last", FEATURES, ids=str)
def test_count_on_the_device(shape, channels_last, n, device):
    """Only the first `count` survivors count, whatever the others are; other rows do not change."""
    x = features(shape, channels_last, torch.float32).to(device)
    N = len(x)
    meant = sorted(torch.randperm(N, generator=torch.Generator().manual_seed(n))[:n].tolist())
    n = len(meant)
    survivors = torch.tensor(meant + [N] * (N - n), device=device)
    count = torch.tensor(n, device=device)
    out = torch.full_like(x, nan)
    ops.compact_into(out, x, survivors, count)
    assert torch.equal(out[:n], x[meant])
    assert bool(out[n:].isnan().all())
    moved = x.clone(memory_format=torch.preserve_format)
    order = ops.compact_(moved, survivors, count)
    assert sorted(order[:n].tolist()) == meant
    assert order[n:].tolist() == [N] * (N - n)
    assert torch.equal(moved[:n], x[order[:n]])
    assert torch.equal(moved[n:], x[n:])


def test_compact_in_place_byte_count():
    """Random survivors: the bytes moved match 2 s (1 - s) F."""
    N, F = 4096, 4096 * 16 * 4
    generator = torch.Generator().manual_seed(0)
    for s in (0.1, 0.5, 0.9):
        survivors = (torch.rand(N, generator=generator) < s).nonzero().flatten()
        order = functional.compact_(torch.randn(N, 16), survivors)
        moved = int((order != torch.arange(len(order))).sum())
        share = len(survivors) / N
        assert 2 * moved * 64 == pytest.approx(2 * share * (1 - share) * F, rel=0.1)


def test_empty_batches(device):
    logits = torch.randn(0, 10, device=device, requires_grad=True)
    target = torch.zeros(0, dtype=torch.int64, device=device)
    gate = functional.exit_gate(logits, 0.5, target=target)
    assert [t.shape for t in gate] == [(0,)] * 3
    functional.exit_loss(logits, target).loss.sum().backward()
    assert logits.grad.shape == (0, 10)
    x = torch.randn(0, 4, 3, 3, device=device)
    head = functional.exit_head(x, torch.randn(10, 4, device=device), None, 0.5)
    assert head.logits.shape == (0, 10)
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    assert functional.compact(x, empty).shape == (0, 4, 3, 3)
    assert functional.compact_(x, empty).shape == (0,)


def test_same_input_same_bits(device):
    logits = torch.randn(700, 1000, device=device)
    first = functional.exit_gate(logits, 0.01)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            again = functional.exit_gate(logits, 0.01)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("function", [functional.exit_gate, functional.exit_loss])
@pytest.mark.parametrize("C", [5, 1000])
@pytest.mark.parametrize("y", [-1, "C"])
def test_target_out_of_range_is_reported(function, C, y, device):
    """One of 600 targets, so that it is not in the block that writes the count."""
    target = torch.zeros(600, dtype=torch.int64, device=device)
    target[321] = C if y == "C" else y
    logits = torch.randn(600, C, device=device)
    with pytest.raises(ValueError, match="target: expected 0 <= target <"):
        function(logits, threshold=0.5, target=target)


@pytest.mark.parametrize("name", ["exit_gate", "exit_loss"])
def test_kernels_refuse_what_would_read_out_of_bounds(name, device):
    """The operators below `functional` keep memory safe on their own."""
    logits, one = torch.randn(4, 5, device=device), torch.tensor(1.0)
    short = torch.tensor([0, 1], device=device)
    with pytest.raises((RuntimeError, ValueError), match="target: expected .*4|size of tensor"):
        if name == "exit_gate":
            ops.exit_gate(logits, one, one, 0, short, False)
        else:
            ops.exit_loss(logits, short, None, None, None, 0.0, 1.0, 0.0, one, one, 0)


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)], ids=str)
def test_rows_without_bytes_take_no_time(shape, device):
    """2**40 of them. tests/faults/test_meta.py has more shapes."""
    survivors = torch.tensor([1, 5, 2**40 - 1], device=device)
    x = torch.empty(2**40, *shape, device=device, requires_grad=True)
    functional.compact(x, survivors).sum().backward()
    assert x.grad.shape == x.shape
    assert functional.compact_(x.detach(), survivors).tolist() == [5, 1, 2**40 - 1]
