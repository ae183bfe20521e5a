"""The rows of a GPU: what is compared, the limits and the targets."""

from __future__ import annotations

import types

import pytest

pytest.importorskip("triton")
from benchmarks.gpu.rows import LARGE, errors_of, rows_of, target
from benchmarks.gpu.timing import Candidate, Measured
from elf_fast.timing import Samples

GATE = {"criterion": "confidence"}


def candidate(name: str, backend: str | None = None, op: str = "exit_gate", bytes: int = 4000):
    return Candidate(op, name, lambda i: None, lambda call: None, bytes, backend)


def job(op: str, shape: tuple[int, ...], settings: dict):
    return types.SimpleNamespace(op=op, shape=shape, dtype="float32", settings=settings)


def case(*candidates: Candidate, about: dict | None = None):
    return types.SimpleNamespace(candidates=candidates, about=about or {})


def measured(synchronising: set[str] = frozenset(), **times: float) -> Measured:
    """Two rounds, the second one twice as slow. The ceilings: 1000 bytes take 1 us, a launch 2."""
    times = {"copy": 1.0, "empty launch": 2.0, **times}
    return Measured(Samples({k: [t, 2 * t] for k, t in times.items()}), set(synchronising))


def test_kernels_are_compared_with_candidates_that_synchronise_like_them():
    names = [candidate("cuda", "cuda"), candidate("called", "cuda"), candidate("plain"),
             candidate("eager")]  # fmt: skip
    keys = {c.name: c.key for c in names}
    times = {keys["cuda"]: 5.0, keys["called"]: 20.0, keys["plain"]: 15.0, keys["eager"]: 60.0}
    found = measured({keys["called"], keys["eager"]}, **times)
    rows = rows_of(job("exit_gate", (512, 1000), GATE), case(*names), found, copied=1000)
    assert {(row.subject, row.baseline): row.ratio.median for row in rows} == {
        ("exit_gate, cuda", "plain"): 3.0,
        ("exit_gate, cuda", "copy"): pytest.approx(4.0 / 5.0),
        ("exit_gate, called", "eager"): 3.0,
    }
    for row in rows:  # the rounds differ by a factor of two, their ratio does not
        assert row.ratio.low == row.ratio.high == row.ratio.median
    assert rows[0].needs["subject"].median == 7.5 and rows[0].shape.startswith(
        "[512, 1000] float32"
    )


def test_networks_are_compared_with_all_others():
    names = [candidate(n, op="network", bytes=0) for n in ("elf_fast", "full", "tuned PyTorch")]
    found = measured(
        {names[0].key}, **{c.key: t for c, t in zip(names, (4.0, 6.0, 5.0), strict=True)}
    )
    settings = {"network": "ResNet-50", "share": 0.5}
    rows = rows_of(job("network", (16, 3, 224, 224), settings), case(*names), found, copied=1000)
    assert [(row.subject, row.baseline, row.ratio.median, row.least) for row in rows] == [
        ("elf_fast", "full", 1.5, None), ("elf_fast", "tuned PyTorch", 1.25, None),
    ]  # fmt: skip


def test_small_copies_are_compared_with_a_launch_and_a_copy():
    own = candidate("cuda", "cuda", "compact", bytes=4000)
    found = measured(**{own.key: 10.0})
    about = {"row bytes": 2048}
    (copy, both) = rows_of(
        job("compact", (8, 512), {"share": 0.5}), case(own, about=about), found, copied=1000
    )
    assert (copy.baseline, copy.ratio.median, copy.least) == ("copy", pytest.approx(0.4), None)
    assert (both.baseline, both.ratio.median, both.least) == ("launch + copy", 0.6, 0.8)
    assert both.bytes == 4000 and both.holds is False and "row bytes" not in both.shape


@pytest.mark.parametrize(
    "op, baseline, shape, bytes, settings, least",
    [
        ("exit_gate", "eager", (256, 1000), 1, GATE, 5.0),
        ("exit_gate", "torch.compile", (256, 1000), 1, GATE, 1.5),
        ("exit_gate", "torch.compile", (256, 1000), 1, {"criterion": "margin"}, None),
        ("exit_gate", "torch.compile", (257, 1000), 1, GATE, None),
        ("exit_gate", "plain", (256, 1000), 1, GATE, None),
        ("exit_gate", "empty launch", (256, 1000), 1, GATE, 1 / 1.3),
        ("exit_gate", "empty launch", (256, 1001), 1, GATE, None),
        ("exit_gate", "copy", (9999, 1000), LARGE, GATE, 0.8),
        ("exit_gate", "copy", (9999, 1000), LARGE - 1, GATE, None),
        ("compact", "copy", (9, 9), LARGE, {"row bytes": 2048}, 0.8),
        ("compact", "launch + copy", (9, 9), LARGE, {"row bytes": 2048}, None),
        ("compact_backward", "launch + copy", (9, 9), 1, {"row bytes": 2048}, 0.8),
        ("compact_into", "launch + copy", (9, 9), 1, {"row bytes": 2047}, None),
        ("compact_", "launch + copy", (9, 9), 1, {"row bytes": 1}, 1 / 1.3),
        ("compact", "index_select", (9, 9), 1, {"row bytes": 2048}, None),
        ("exit_head", "copy", (9, 9), 40e6, {}, 0.8),
        ("exit_head", "copy", (9, 9), 39e6, {}, None),
        ("exit_loss", "torch.compile", (9, 9), 1, {}, 1.5),
        ("exit_loss", "eager", (9, 9), 1, {}, None),
        ("network", "full", (9, 9), 0, {}, None),
    ],
)
def test_targets(op, baseline, shape, bytes, settings, least):
    assert target(op, baseline, shape, bytes, settings) == least


def test_errors_name_the_candidate_and_the_shape():
    names = [candidate("cuda", "cuda"), candidate("plain")]
    found = errors_of(job("exit_gate", (2, 3), GATE), case(*names), {names[1].key: "wrong: all"})
    assert found == [{"subject": "exit_gate, plain", "shape": "[2, 3] float32, confidence",
                      "error": "wrong: all"}]  # fmt: skip
