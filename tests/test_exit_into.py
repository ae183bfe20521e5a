"""exit_gate_into and exit_head_into: the results of exit_gate and exit_head at their places."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from cases import FEATURES, features, gate_cases
from torch.library import opcheck

import elf_fast
from elf_fast import ops

CASES = [case for case in gate_cases() if case.make("cpu")["target"] is None][::4]
M_OVER_N = 3  # rows of the outputs for each sample that reaches the exit


@pytest.fixture(params=["torch", "cpu"])
def served(request):
    """The backends that serve these operators."""
    with elf_fast.use_backend(request.param):
        yield


def outputs(M: int, C: int, n: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """out_logits, out_confidence, out_prediction, out_exit_index, survivors, next_rows, count."""
    return [
        torch.full((M, C), -7.0, dtype=dtype),
        torch.full((M,), -7.0),
        *(torch.full((rows,), -7) for rows in (M, M, n + 2, n + 2)),
        torch.tensor(-7),
    ]


def expected_outputs(logits, gate, is_last, rows, M):
    """What the operator must write, row by row."""
    confidence, prediction, survivors, count = gate
    n, C = logits.shape
    out = outputs(M, C, n, logits.dtype)
    kept = [] if is_last else survivors[: int(count)].tolist()
    rows = list(range(n)) if rows is None else rows.tolist()
    for k in set(range(n)) - set(kept):
        out[0][rows[k]], out[1][rows[k]] = logits[k], confidence[k]
        out[2][rows[k]], out[3][rows[k]] = prediction[k], 5
    for s, k in enumerate(kept):
        out[4][s], out[5][s] = k, rows[k]
    out[6] = torch.tensor(len(kept))
    return out


def rows_for(n: int, placed: bool) -> torch.Tensor | None:
    if not placed:
        return None
    generator = torch.Generator().manual_seed(n)
    return torch.randperm(M_OVER_N * n, generator=generator)[:n].sort().values


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("placed", [False, True], ids=["in order", "placed"])
@pytest.mark.parametrize("is_last", [False, True], ids=["goes on", "last"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_exit_gate_into(case, is_last, placed, served):
    kwargs = case.make("cpu")
    z = kwargs["logits"]
    acc = torch.float64 if z.dtype == torch.float64 else torch.float32
    t = torch.as_tensor(kwargs["threshold"]).to(acc)
    T = torch.as_tensor(kwargs["temperature"]).to(acc)
    code = elf_fast.criteria.TABLE[case.criterion].code
    rows = rows_for(len(z), placed)
    M = max(M_OVER_N * len(z), 1)
    out = outputs(M, z.shape[1], len(z), z.dtype)
    ops.exit_gate_into(z, t, T, code, is_last, 5, rows, *out)
    gate = ops.exit_gate(z, t, T, code, None, False)
    assert_same(out, expected_outputs(z, gate, is_last, rows, M))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape, channels_last", FEATURES, ids=str)
def test_exit_head_into(shape, channels_last, bias, served):
    x = features(shape, channels_last, torch.float32)
    N, D = x.shape[0], x.shape[2 if x.dim() == 3 else 1]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, D, generator=generator)
    b = torch.randn(9, generator=generator) if bias else None
    one, rows = torch.tensor(1.0), rows_for(N, True)
    z, _, *gate = ops.exit_head(x, weight, b, one * 0.5, one, 0, None, False, True)
    out = outputs(M_OVER_N * N, 9, N, torch.float32)
    ops.exit_head_into(x, weight, b, one * 0.5, one, 0, False, 5, rows, *out)
    assert_same(out, expected_outputs(z, gate, False, rows, M_OVER_N * N))


def test_nan_goes_on_until_the_last_exit(served):
    z = torch.tensor([[float("nan"), 1.0], [9.0, 0.0]])
    one = torch.tensor(1.0)
    for is_last, survivors in ((False, [0]), (True, [])):
        out = outputs(2, 2, 2, torch.float32)
        ops.exit_gate_into(z, 0 * one, one, 0, is_last, 5, None, *out)
        assert out[4][: int(out[6])].tolist() == survivors
        assert out[3].tolist() == [-7 if survivors else 5, 5]


SHARED = torch.tensor([0, 2, 3, 5])
ARGUMENTS = {
    "logits": torch.randn(4, 3),
    "threshold": torch.tensor(0.5),
    "temperature": torch.tensor(1.0),
    "criterion": 0,
    "is_last": False,
    "exit": 1,
    "rows": torch.tensor([0, 2, 3, 5]),
    **dict(
        zip(
            [a.name for a in ops.exit_gate_into._schema.arguments[7:]],
            outputs(6, 3, 4, torch.float32),
            strict=True,
        )
    ),
}
WRONG = {  # each would read or write past the end of a tensor
    "rows past the end": {"rows": torch.tensor([0, 2, 3, 6])},
    "a negative row": {"rows": torch.tensor([-1, 2, 3, 5])},
    "a row twice": {"rows": torch.tensor([0, 2, 2, 5])},
    "too few rows": {"rows": torch.tensor([0, 2, 3])},
    "rows of another dtype": {"rows": torch.tensor([0, 2, 3, 5], dtype=torch.int32)},
    "too few outputs": {"rows": None, "out_logits": torch.zeros(3, 3)},
    "fewer classes": {"out_logits": torch.zeros(6, 2)},
    "another dtype": {"out_logits": torch.zeros(6, 3, dtype=torch.float64)},
    "columns of logits": {"out_logits": torch.zeros(3, 6).T},
    "short confidence": {"out_confidence": torch.zeros(5)},
    "confidence in float64": {"out_confidence": torch.zeros(6, dtype=torch.float64)},
    "short predictions": {"out_prediction": torch.zeros(5, dtype=torch.int64)},
    "exit_index in int32": {"out_exit_index": torch.zeros(6, dtype=torch.int32)},
    "short survivors": {"survivors": torch.zeros(3, dtype=torch.int64)},
    "short next_rows": {"next_rows": torch.zeros(3, dtype=torch.int64)},
    "rows as next_rows": {"rows": SHARED, "next_rows": SHARED},
    "an empty count": {"count": torch.zeros(0, dtype=torch.int64)},
    "logits of three dimensions": {"logits": torch.randn(4, 3, 1)},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_arguments_raise_before_anything_is_written(wrong):
    arguments = {
        k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in ARGUMENTS.items()
    } | WRONG[wrong]
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    with elf_fast.use_backend("cpu"), pytest.raises((RuntimeError, ValueError)):
        ops.exit_gate_into(*arguments.values())
    assert all(torch.equal(arguments[k], v) for k, v in before.items())


def test_messages_name_rows_and_values():
    arguments = ARGUMENTS | {"rows": torch.tensor([0, 2, 3, 6])}
    message = "rows: expected ascending indices below M = 6, got 6 at position 3"
    with elf_fast.use_backend("cpu"), pytest.raises(RuntimeError, match=re.escape(message)):
        ops.exit_gate_into(*arguments.values())
    message = "rows: expected ascending indices in [0, 6), got [0, 2, 3, 6]"
    with elf_fast.use_backend("torch"), pytest.raises(ValueError, match=re.escape(message)):
        ops.exit_gate_into(*arguments.values())


def test_opcheck(served):
    check = functools.partial(opcheck, test_utils=("test_schema", "test_faketensor"))
    check(ops.exit_gate_into, tuple(ARGUMENTS.values()))
    head = (torch.randn(4, 5, 2, 2), torch.randn(3, 5), torch.randn(3))
    check(ops.exit_head_into, (*head, *list(ARGUMENTS.values())[1:]))
