"""What an evaluation notes about every exit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("torchmetrics")

from elf_fast import ELF, ExitHead
from elf_fast.flops import count_flops
from elf_fast.metrics import ELFMetrics
from elf_fast.policy.exit_table import exit_table
from elf_fast.runs.observation import observe

C = 4


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    stages = [nn.Linear(6, 6) for _ in range(3)]
    model = ELF(stages, [ExitHead(6, C) for _ in stages], thresholds=0.4, temperatures=0.5).eval()
    x, y = torch.randn(90, 6), torch.randint(C, (90,))
    metrics = ELFMetrics([9] * C, count_flops(model, x[:1]), temperatures=[0.5, 0.5, 2.0])
    batches = list(zip(x.split(32), y.split(32), strict=True))
    return model, x, y, batches, metrics


def test_it_repeats_the_evaluation_and_the_exit_table(case):
    model, x, y, batches, metrics = case
    seen = observe(model, batches, metrics.clone())
    out = model(x)
    assert torch.equal(seen.exit_index, out.exit_index)
    assert seen.metrics["overall"] == (out.prediction == y).double().mean().item()
    table = exit_table(model, batches)
    for name in ("statistic", "prediction", "target"):
        assert torch.equal(getattr(seen.table, name), getattr(table, name))
    right = table.correct.double().mean(1).tolist()
    assert seen.metrics["anytime_accuracy"] == pytest.approx(right)
    last = model.heads[2](model.stages[2](model.stages[1](model.stages[0](x))))
    torch.testing.assert_close(seen.probability[2], (last / 2).softmax(1).amax(1))
    weighed = ELFMetrics([9] * C, metrics.flops, temperatures=[0.5, 0.5, 2.0], prior=[0, 0, 1, 0])
    seen = observe(model, batches, weighed)
    only = table.correct[:, y == 2].double().mean(1).tolist()
    assert seen.metrics["anytime_accuracy"] == pytest.approx(only)


def test_the_surest_of_those_that_left_early_and_wrong_are_kept(case):
    model, x, y, batches, metrics = case
    out = model(x)
    wrong = ((out.prediction != y) & (out.exit_index < 2)).nonzero().flatten()
    assert 6 < len(wrong) < 90
    p = out.confidence[wrong]
    expected = wrong[p.argsort(descending=True)][:6]
    seen = observe(model, batches, metrics.clone(), wrong=6)
    assert [w.sample for w in seen.early_wrong] == expected.tolist()
    for w in seen.early_wrong:
        assert torch.equal(w.image, x[w.sample])
        assert (w.target, w.prediction) == (int(y[w.sample]), int(out.prediction[w.sample]))
        assert w.final_prediction == int(seen.table.prediction[-1, w.sample])
        assert w.probability == pytest.approx(out.confidence[w.sample].item(), abs=1e-6)


def test_chosen_images_are_kept_in_order(case):
    model, x, _, batches, metrics = case
    seen = observe(model, batches, metrics.clone(), images={89, 3, 40})
    assert torch.equal(seen.images, x[[3, 40, 89]])


def test_no_batches_are_an_empty_observation(case):
    model, _, _, _, metrics = case
    seen = observe(model, [], metrics.clone())
    assert seen.table.prediction.shape == (3, 0) and seen.early_wrong == []
    assert seen.metrics["anytime_accuracy"] == [None] * 3 == seen.metrics["anytime_ece"]
