"""The exit criteria: one table in Python, and the same in C++ and in Triton."""

from __future__ import annotations

import re

import gpu_code
import pytest
import torch

from elf_fast import criteria, ops

TABLE = {c.name: (c.code, c.larger_is_surer) for c in criteria.TABLE.values()}


def test_names_and_codes_are_unique():
    assert list(TABLE) == list(criteria.TABLE)
    assert sorted(code for code, _ in TABLE.values()) == list(range(len(TABLE)))


def test_cpp_has_the_same_criteria():
    """`Criterion`, `larger_is_surer`, `for_criterion` and `checked_criterion` are generated from
    this list."""
    header = (gpu_code.ROOT / "csrc" / "criterion.h").read_text(encoding="utf-8")
    rows = re.findall(r"\bX\((\w+), (\d+), (true|false)\)", header)
    assert {name: (int(code), larger == "true") for name, code, larger in rows} == TABLE
    assert len(rows) == len(TABLE)


def test_triton_has_the_same_criteria():
    pytest.importorskip("triton")
    from elf_fast.kernels import row_state

    codes = {name: getattr(row_state, name.upper()).value for name in TABLE}
    assert {n: (code, row_state.LARGER_IS_SURER[code]) for n, code in codes.items()} == TABLE
    assert list(row_state.LARGER_IS_SURER) == [code for code, _ in TABLE.values()]


@pytest.mark.parametrize("rows", [0, 4])
@pytest.mark.parametrize("code", [-1, 7])
@pytest.mark.parametrize("name", ["exit_gate", "exit_loss", "exit_head"])
def test_an_unknown_code_is_refused(name, code, rows, device):
    z, one = torch.randn(rows, 5, device=device), torch.tensor(1.0)
    y = torch.zeros(rows, dtype=torch.int64, device=device)
    weight = torch.randn(3, 5, device=device)
    calls = {
        "exit_gate": lambda c: ops.exit_gate(z, one, one, c, None, False),
        "exit_loss": lambda c: ops.exit_loss(z, y, None, None, None, 0.0, 1.0, 0.0, one, one, c),
        "exit_head": lambda c: ops.exit_head(z, weight, None, one, one, c, None, False, True),
    }
    for known, _ in TABLE.values():
        calls[name](known)
    codes = ", ".join(str(known) for known, _ in TABLE.values())
    message = rf"criterion: expected one of the codes {codes}, got {code}$"
    with pytest.raises((ValueError, RuntimeError), match=message):
        calls[name](code)
