"""What only a GPU can show: CUDA graphs, streams and devices, and that no operator waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import elf_fast
from elf_fast import backend, functional, losses, ops, reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

N, D, C = 24, 64, 200
CASES = [("cuda", op) for op in backend.CUDA_CPP] + [("triton", op) for op in backend.TRITON]


@pytest.fixture(params=CASES, ids="-".join)
def call(request) -> Any:
    """A backend's operator on inputs of `inputs`, with what it changes among its results."""
    name, op = request.param
    if (reason := backend._why_not(name)) is not None:
        pytest.skip(reason)
    with elf_fast.use_backend(name), torch.no_grad():
        yield CALLS[op]


def inputs(seed: int, device: str = "cuda") -> dict[str, Tensor]:
    """Different survivors and logits for every seed, in tensors of the same shapes."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    n = N // 2
    survivors = torch.randperm(N, generator=generator)[:n].sort().values
    count = 3 + seed % 7
    padded = torch.cat([survivors[:count], torch.full((N - count,), N)])
    sharpness = torch.linspace(0.1, 8.0, N)[torch.randperm(N, generator=generator), None]
    made = {
        "logits": randn(N, C) * sharpness,
        "features": randn(N, D, 5, 5), "out": torch.full((N, D, 5, 5), -1.0),
        "weight": randn(C, D), "bias": randn(C), "grad": randn(n, D, 5, 5),
        "target": torch.randint(0, C, (N,), generator=generator), "survivors": survivors,
        "padded": padded, "count": torch.tensor(count), "grad_loss": randn(N),
        "threshold": torch.tensor(0.6), "temperature": torch.tensor(1.0 + 0.1 * seed),
    }  # fmt: skip
    made["log_sum"] = (made["logits"] - made["logits"].amax(dim=1, keepdim=True)).logsumexp(dim=1)
    return {k: v.to(device) for k, v in made.items()}


def _into(x: dict[str, Tensor]) -> Tensor:
    ops.compact_into(x["out"], x["features"], x["padded"], x["count"])
    return x["out"]


def _in_place(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return ops.compact_(x["features"], x["padded"], x["count"]), x["features"]


def _settings(x: dict[str, Tensor]) -> tuple[Tensor, Tensor, int]:
    return x["threshold"], x["temperature"], 0


FAMILY = (None, None, None, 0.0, 1.0, 0.0)
CALLS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "exit_gate": lambda x: ops.exit_gate(x["logits"], *_settings(x), x["target"], False),
    "exit_head": lambda x: ops.exit_head(
        x["features"], x["weight"], x["bias"], *_settings(x), None, False, True
    ),
    "compact": lambda x: ops.compact(x["features"], x["survivors"]),
    "compact_into": _into,
    "compact_": _in_place,
    "compact_backward": lambda x: ops.compact_backward(x["grad"], x["survivors"], N),
    "exit_loss": lambda x: ops.exit_loss(x["logits"], x["target"], *FAMILY, *_settings(x)),
    "exit_loss_backward": lambda x: ops.exit_loss_backward(
        x["grad_loss"], x["logits"], x["target"], x["log_sum"], *FAMILY
    ),
}


def results(out: Any) -> list[Tensor]:
    """Copies on the CPU."""
    return [t.cpu().clone() for t in (out if isinstance(out, tuple) else (out,))]


def assert_equal(out: list[Tensor], expected: list[Tensor]) -> None:
    assert len(out) == len(expected)
    for a, b in zip(out, expected, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), (a, b)


def fill(x: dict[str, Tensor], seed: int) -> None:
    for name, value in inputs(seed).items():
        x[name].copy_(value)


def test_a_graph_replays_with_new_inputs(call):
    """Bit for bit what the eager call gives, for inputs and counts that the capture did not see."""
    x = inputs(0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(x)  # compiles what there is to compile
        graph = torch.cuda.CUDAGraph()
        fill(x, 1)
        with torch.cuda.graph(graph, stream=stream):
            out = call(x)
        for seed in (2, 3, 2):
            fill(x, seed)
            graph.replay()
            replayed = results(out)
            assert_equal(replayed, results(call(inputs(seed))))
    assert replayed[0].abs().sum() > 0


def test_gates_of_two_graphs_on_two_streams_do_not_disturb_each_other():
    """The C++ gate counts the blocks that arrive: graphs that run at once must not share that."""
    if (reason := backend._why_not("cuda")) is not None:
        pytest.skip(reason)
    made = []
    with elf_fast.use_backend("cuda"), torch.no_grad():
        for seed in (1, 2):
            z = torch.randn(4000, 700, generator=torch.Generator().manual_seed(seed)).cuda() * 4
            t, T = torch.tensor(0.6).cuda(), torch.tensor(1.0).cuda()
            expected = results(ops.exit_gate(z, t, T, 0, None, False))
            stream = torch.cuda.Stream()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                out = ops.exit_gate(z, t, T, 0, None, False)
            made.append((graph, stream, out, expected, z))
        for _ in range(50):
            for graph, stream, *_ in made:
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
        for _, _, out, expected, _ in made:
            assert_equal(results(out), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(90_001, 10), (20_003, 100), (5001, 1003)], ids=str)
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_more_rows_than_the_device_holds_at_once(name, shape, dtype):
    """Every row is read, and its flag reaches the block that places survivors, in many runs."""
    if (reason := backend._why_not(name)) is not None:
        pytest.skip(reason)
    N, C = shape
    generator = torch.Generator().manual_seed(C)
    sharpness = torch.linspace(0.1, 8.0, N)[torch.randperm(N, generator=generator), None]
    z = (torch.randn(shape, generator=generator) * sharpness).to(dtype).cuda()
    t, T = torch.tensor(0.6).cuda(), torch.tensor(1.0).cuda()
    truth = reference.exit_gate(z.double(), 0.6)
    with elf_fast.use_backend(name), torch.no_grad():
        outs = [ops.exit_gate(z, t, T, 0, None, False) for _ in range(50)]
    confidence, prediction, survivors, count = outs[0]
    torch.testing.assert_close(confidence.double(), truth.confidence, rtol=0, atol=2e-6)
    assert torch.equal(prediction, truth.prediction)
    n = int(count)
    goes_on, expected = (torch.zeros(N, dtype=torch.bool, device="cuda") for _ in range(2))
    goes_on[survivors[:n]], expected[truth.survivors] = True, True
    assert int(goes_on.sum()) == n and bool((survivors[1:n] > survivors[: n - 1]).all())
    assert bool((survivors[n:] == N).all())
    assert bool(((goes_on == expected) | ((truth.confidence - 0.6).abs() < 2e-6)).all())
    for out in outs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(out, outs[0], strict=True))


def test_no_operator_waits_for_the_device(call):
    x = inputs(0)
    call(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            int(x["count"])  # synchronising raises: the mode is on
        call(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_only_the_exact_survivors_wait():
    """`functional.exit_gate` reads the count, once."""
    x = inputs(0)
    functional.exit_gate(x["logits"], 0.6)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as waits:
            functional.exit_gate(x["logits"], 0.6)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1


def test_a_loss_alone_does_not_wait():
    x = inputs(0)
    loss = losses.FocalLoss()
    loss(x["logits"], x["target"])
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(x["logits"], x["target"])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_work_goes_to_the_current_stream(call):
    """The inputs are written on that stream long after the call has returned."""
    expected = results(call(inputs(5)))
    x, late = inputs(4), inputs(5)
    call(x)
    fill(x, 4)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # some 25 ms
        for name, value in late.items():
            x[name].copy_(value)
        out = call(x)
        assert not stream.query(), "the device was done before the call returned"
        assert_equal(results(out), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_work_goes_to_the_device_of_the_tensors(call):
    expected = results(call(inputs(0, "cuda:0")))
    with torch.cuda.device(0):
        out = call(inputs(0, "cuda:1"))
        assert torch.cuda.current_device() == 0
    for t in out if isinstance(out, tuple) else (out,):
        assert t.device == torch.device("cuda", 1)
    assert_equal(results(out), expected)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_more_than_2_31_elements(name):
    """Rows past the reach of 32-bit offsets."""
    if (reason := backend._why_not(name)) is not None:
        pytest.skip(reason)
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of free memory")
    wide = 2**21
    rows = 2**31 // wide + 3
    with elf_fast.use_backend(name), torch.no_grad():
        x = torch.zeros(rows, wide, dtype=torch.bfloat16, device="cuda")
        x[-1, 5] = x[-2, wide - 1] = x[0, 7] = 20.0
        gate = functional.exit_gate(x, 0.5)
        leaving = {0: 7, rows - 2: wide - 1, rows - 1: 5}
        assert gate.survivors.tolist() == [n for n in range(rows) if n not in leaving]
        assert {n: int(gate.prediction[n]) for n in leaving} == leaving
        kept = functional.compact(x, torch.tensor([0, rows - 1], device="cuda"))
        assert kept[0, 7] == 20 and kept[1, 5] == 20 and kept.count_nonzero() == 2
        back = ops.compact_backward(kept, torch.tensor([1, rows - 1], device="cuda"), rows)
        assert back[1, 7] == 20 and back[-1, 5] == 20 and back.count_nonzero() == 2
