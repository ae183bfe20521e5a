"""The table of every exit's results."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from elf_fast import ELF, criteria
from elf_fast.demo.loop import batches, predict
from elf_fast.policy.exit_table import ExitTable, exit_table
from elf_fast.runs import demo_network as network


def length(logits: torch.Tensor) -> torch.Tensor:
    """A user's criterion: large logits are sure."""
    return logits.norm(dim=1)


@pytest.mark.parametrize("criterion", [*criteria.TABLE, length])
@pytest.mark.parametrize("per_class", [False, True])
def test_the_table_leaves_where_the_model_leaves(digits, trained, criterion, per_class):
    model = copy.deepcopy(trained)
    model.criterion = criterion
    images, targets = digits.validation.images, digits.validation.targets
    table = exit_table(model, batches(digits.validation))
    # Between the values of two samples, so that rounding decides nothing.
    middle = table.statistic[:-1].sort(dim=1).values[:, 99:101].mean(dim=1)
    thresholds = middle
    if per_class:
        off = criteria.find(criterion).off
        thresholds = middle[:, None].repeat(1, 10)
        thresholds[:, 1] = off
    model.thresholds = thresholds
    out = predict(model, images, batch_size=64)
    assert torch.equal(table.exit_index(model.thresholds), out.exit_index)
    correct = table.correct.gather(0, out.exit_index[None])[0]
    assert torch.equal(correct, out.prediction == targets)
    assert set(out.exit_index.tolist()) == {0, 1, 2}


def test_a_later_stage_may_write_into_the_logits():
    torch.manual_seed(0)
    stages = [nn.Linear(6, 3), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3))]
    model = ELF(stages, [nn.Identity(), nn.Identity()], thresholds=0.45).eval()
    x = torch.randn(50, 6)
    table, out = exit_table(model, [(x, torch.zeros(50).long())]), model(x)
    assert torch.equal(table.exit_index(model.thresholds), out.exit_index)
    assert torch.equal(table.prediction.gather(0, out.exit_index[None])[0], out.prediction)


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_features_that_the_model_takes():
    """Rows that share memory before a stage in place, and a pair before the last head."""
    stages = [Apply(lambda x: x[:1].expand(len(x), 6)), nn.ReLU(inplace=True),
              Apply(lambda x: (x, x))]  # fmt: skip
    heads = [nn.Linear(6, 3), nn.Linear(6, 3), Apply(lambda pair: (pair[0] + pair[1])[:, :3])]
    model = ELF(stages, heads, thresholds=0.45).eval()
    x = torch.randn(7, 6)
    table = exit_table(model, [(x, torch.zeros(7).long())])
    with torch.no_grad():
        assert torch.equal(table.exit_index(model.thresholds), model(x).exit_index)
        assert model(x[:0]).logits.shape == (0, 3)


def test_tables_of_processes_join_also_an_empty_one(digits):
    model = network.with_exits(10)
    whole = exit_table(model, batches(digits.validation, 50))
    parts = list(batches(digits.validation, 50))
    tables = [exit_table(model, [part]) for part in parts] + [exit_table(model, [])]
    assert tables[-1].statistic.shape == (3, 0)
    joined = ExitTable.joined(tables)
    assert all(torch.equal(a, b) for a, b in zip(joined[:3], whole[:3], strict=True))


# Logits


def test_logits_of_ones_own_give_the_table_of_the_network(digits, trained):
    model = copy.deepcopy(trained)
    model.temperatures = [2.0, 0.5]
    whole = exit_table(model, batches(digits.validation), keep_logits=True)
    assert whole.logits.shape == (3, 200, 10)
    own = ExitTable.from_logits(whole.logits.numpy(), whole.target.numpy(), temperatures=[2.0, 0.5])
    torch.testing.assert_close(own.statistic, whole.statistic)
    assert torch.equal(own.prediction, whole.prediction) and own.digest() == whole.digest()
    assert own.digest() != own.rows(torch.arange(199)).digest()


@pytest.mark.parametrize("criterion", [*criteria.TABLE, length])
def test_criterion_and_temperatures_change_without_the_network(digits, trained, criterion):
    model = copy.deepcopy(trained)
    kept = exit_table(model, batches(digits.validation), keep_logits=True)
    model.criterion, model.temperatures = criterion, [0.5, 2.0]
    direct = exit_table(model, batches(digits.validation))
    changed = kept.changed(criterion=criterion, temperatures=[0.5, 2.0])
    torch.testing.assert_close(changed.statistic, direct.statistic)
    assert changed.criterion == direct.criterion
    some = changed.rows(torch.tensor([5, 3]))
    assert torch.equal(some.statistic, changed.statistic[:, [5, 3]])
    assert torch.equal(some.logits, kept.logits[:, [5, 3]])


def test_many_logits_go_to_a_file_that_leaves_nothing_behind(digits, trained, tmp_path):
    parts = list(batches(digits.validation, 50))
    held = exit_table(trained, parts, keep_logits=True)
    filed = exit_table(trained, parts, keep_logits=True, memory=3 * 70 * 10 * 4, folder=tmp_path)
    assert torch.equal(filed.logits, held.logits)
    assert torch.equal(filed.changed(temperatures=3.0).statistic,
                       held.changed(temperatures=3.0).statistic)  # fmt: skip
    assert list(tmp_path.iterdir()) == []  # the file has no name


BAD = [
    ((torch.zeros(3, 4), torch.zeros(4).long()), ValueError, r"logits: expected floating \[E, N"),
    ((torch.zeros(3, 4, 2).long(), torch.zeros(4).long()), ValueError, "logits: expected floating"),
    ((torch.zeros(3, 0, 2), torch.zeros(0).long()), ValueError, "logits: .* at least one exit, "),
    (
        ("logits", torch.zeros(4).long()),
        TypeError,
        "logits: expected a tensor or an array, got str",
    ),
    ((torch.zeros(3, 4, 2), torch.zeros(4)), TypeError, "target: expected integers, got a float32"),
    ((torch.zeros(3, 4, 2), torch.zeros(5).long()), ValueError, r"target: expected shape \[4\]"),
    ((torch.zeros(3, 4, 2), torch.full((4,), 2)), ValueError, "target: expected 0 <= target < 2"),
]


@pytest.mark.parametrize("given, error, message", BAD, ids=[b[2][:25] for b in BAD])
def test_arrays_that_make_no_table_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        ExitTable.from_logits(*given)


def test_a_table_without_logits_cannot_change(digits, trained):
    table = exit_table(trained, batches(digits.validation))
    with pytest.raises(ValueError, match="table: expected one that holds logits, got one without"):
        table.changed(criterion="entropy")
    with pytest.raises(ValueError, match="temperatures: expected a scalar or 2 values"):
        exit_table(trained, batches(digits.validation), keep_logits=True).changed(
            temperatures=[1.0]
        )
