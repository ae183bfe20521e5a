"""The exit criteria: the tables in Python, C++ and Triton agree."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import gpu_code
import pytest
import torch
from torch import nn

from elf_fast import ELF, ExitHead, checks, criteria, functional, ops, reference
from elf_fast.bench import workload
from elf_fast.cli.main import parser
from elf_fast.flops import Flops
from elf_fast.policy import one_number
from elf_fast.policy.exit_table import ExitTable, exit_table
from elf_fast.runs.config import TrainConfig

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


# A criterion that only the table has


@pytest.fixture
def newcomer(monkeypatch):
    """A criterion that stands only in the table: neither reference nor kernels have a formula."""
    made = criteria.Criterion("newcomer", code=9, larger_is_surer=False, low=-1.0, high=2.0)
    monkeypatch.setitem(criteria.TABLE, made.name, made)
    return made


def test_operators_refuse_a_criterion_without_a_formula(newcomer, device):
    z, y = torch.randn(4, 3, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    weight = torch.randn(3, 3, device=device)
    known = "criterion: expected one of (the codes 0, 1, 2, got 9|confidence, margin, entropy, whi)"
    for call in (
        lambda: functional.exit_gate(z, 0.5, criterion="newcomer"),
        lambda: functional.exit_head(z, weight, None, 0.5, criterion="newcomer"),
        lambda: functional.exit_loss(z, y, threshold=0.5, criterion="newcomer"),
        lambda: functional.exit_loss(z, y, criterion="newcomer"),
        lambda: reference.exit_gate(z, 0.5, criterion="newcomer"),
        lambda: reference.statistic_grad(z[:, 0], z, 1.0, newcomer),
    ):
        with pytest.raises((ValueError, RuntimeError), match=known):
            call()


@pytest.mark.parametrize("cls", [reference.ELF, ELF], ids=["reference", "elf_fast"])
@pytest.mark.parametrize("head", [ExitHead, nn.Linear])
def test_networks_calibration_and_workloads_refuse_it_too(newcomer, cls, head):
    heads = [head(6, 3), head(6, 3)]
    model = cls([nn.Identity()] * 2, heads, criterion="newcomer", thresholds=1.5)
    x, y = torch.randn(4, 6), torch.zeros(4, dtype=torch.int64)
    for call in (
        lambda: model.eval()(x),
        lambda: model.train()(x, y),
        lambda: exit_table(model, [(x, y)]),
        lambda: workload.inference_work(model, x, 0.5),
    ):
        with pytest.raises((ValueError, RuntimeError), match="criterion: expected one of"):
            call()


def test_code_that_needs_only_the_row_accepts_it(newcomer):
    """Thresholds, sweeps, settings and flags."""
    with pytest.raises(ValueError, match=r"expected values in \[-1, 2\], or -inf to switch .* 3"):
        checks.threshold_values("threshold", 3.0, newcomer)
    settings = TrainConfig(dataset="digits", criterion="newcomer", thresholds=(-0.5, -math.inf))
    with pytest.raises(ValueError, match=r"thresholds: expected values in \[-1, 2\]"):
        replace(settings, thresholds=(math.inf,))
    assert parser().parse_args(["train", "--criterion", "newcomer"]).criterion == "newcomer"
    table = ExitTable(
        statistic=torch.tensor([[-0.9, 0.0, 1.9], [0.0, 0.0, 0.0]]),
        prediction=torch.tensor([[0, 0, 0], [1, 1, 1]]),
        target=torch.tensor([0, 0, 1]),
        criterion=newcomer,
    )
    points = one_number.sweep(table, Flops((1, 1), (0, 0)))
    assert (points[0].threshold, points[0].flops) == (2.0, 1.0)
    assert (points[-1].threshold, points[-1].flops) == (-math.inf, 2.0)
    assert one_number.choose(points).accuracy == 1.0
