"""Choosing thresholds on a table."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from elf_fast import criteria
from elf_fast.demo.loop import batches, predict
from elf_fast.flops import Flops, count_flops
from elf_fast.policy import one_number
from elf_fast.policy.exit_table import ExitTable, exit_table
from elf_fast.policy.one_number import OperatingPoint, moved_to

CONFIDENCE, ENTROPY = criteria.by_name("confidence"), criteria.by_name("entropy")
SCORE = criteria.find(lambda logits: logits.amax(dim=1))


def test_the_sweep_and_the_cheapest_of_the_most_accurate_thresholds():
    right = torch.tensor([[True, True, False, False], [True, True, True, False]])
    table = ExitTable(
        statistic=torch.tensor([[0.9, 0.8, 0.7, 0.3], [0.1, 0.1, 0.1, 0.1]]),
        prediction=(~right).long(),
        target=torch.zeros(4, dtype=torch.int64),
        criterion=CONFIDENCE,
    )
    flops = Flops((10, 10), (0, 0))
    points = one_number.sweep(table, flops, (0.6, 0.75, 0.85, math.inf))
    assert [(p.accuracy, p.flops) for p in points] == [(0.5, 12.5), (0.75, 15), (0.75, 17.5),
                                                       (0.75, 20)]  # fmt: skip
    assert one_number.choose(points).threshold == 0.75
    equal = [p._replace(accuracy=0.5, flops=15.0) for p in points]
    assert one_number.choose(equal) == equal[-1]  # the most cautious


@pytest.mark.parametrize("criterion", [*criteria.TABLE, SCORE.score])
def test_the_candidates_go_from_bold_to_never(digits, trained, criterion):
    model = copy.deepcopy(trained)
    model.criterion = criterion
    table = exit_table(model, batches(digits.validation))
    points = one_number.sweep(table, count_flops(model, digits.test.images[:1]))
    flops = [p.flops for p in points]
    assert flops == sorted(flops) and len(set(flops)) > 10
    assert points[-1].threshold == criteria.find(criterion).off
    assert flops[0] == min(p.flops for p in points) and len(points) > 100
    first = predict_exits(model, points[0].threshold, digits)
    assert first[0] == max(first) > 0.9 * sum(first)
    assert predict_exits(model, points[-1].threshold, digits) == [0, 0, 200]


def predict_exits(model, threshold, digits) -> list[int]:
    one_number.set_threshold(model, threshold)
    out = predict(model, digits.validation.images)
    return torch.bincount(out.exit_index, minlength=3).tolist()


def test_when_every_threshold_loses_the_exits_stay_off():
    points = [
        OperatingPoint(0.5, 0.8, 10.0),
        OperatingPoint(0.9, 0.89, 15.0),
        OperatingPoint(math.inf, 0.9, 20.0),
    ]
    assert one_number.choose(points).threshold == math.inf


def test_equally_cheap_points_are_settled_by_accuracy_and_then_caution():
    accuracy = {0.5: 0.9, 0.6: 0.92, 0.7: 0.92}
    points = [OperatingPoint(t, a, 10.0) for t, a in accuracy.items()]
    points.append(OperatingPoint(math.inf, 0.9, 20.0))
    assert one_number.choose(points).threshold == 0.7


def test_within_a_limit_of_flops_the_most_accurate_and_below_all_an_error():
    points = [
        OperatingPoint(0.5, 0.7, 10.0),
        OperatingPoint(0.7, 0.8, 12.0),
        OperatingPoint(math.inf, 0.9, 20.0),
    ]
    chosen = [one_number.choose(points, limit).threshold for limit in (20.0, 19.9, 11.0)]
    assert chosen == [math.inf, 0.7, 0.5]
    with pytest.raises(ValueError, match="max_flops: expected at least 10 per sample, got 9"):
        one_number.choose(points, 9.0)


def test_the_least_flops_are_those_of_the_first_exit_that_is_on():
    flops, inf = Flops((10, 20, 30), (1, 2, 3)), math.inf
    for thresholds, least in (
        ([0.9, 0.9], 11), ([inf, 0.9], 33), ([inf, inf], 11), ([[inf, 0.5], [0.5, 0.5]], 11),
        ([[inf, inf], [0.5, inf]], 33),
    ):  # fmt: skip
        assert one_number.least_flops(flops, torch.tensor(thresholds)) == least


# Moving thresholds that differ


def odds(t: torch.Tensor) -> torch.Tensor:
    return t.double().logit()


@pytest.mark.parametrize("criterion", [CONFIDENCE, ENTROPY], ids=lambda c: c.name)
def test_classes_keep_their_log_odds_apart_and_their_shape(criterion):
    before = torch.tensor([[0.9, 0.8, 0.6], [0.7, 0.5, 0.3]])
    after = moved_to(0.4, before, criterion)
    assert after.shape == before.shape and after.dtype == torch.float32
    shift = odds(after) - odds(before)
    torch.testing.assert_close(shift, shift[:1, :1].expand(2, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(odds(after).mean().sigmoid().item(), 0.4, rtol=0, atol=1e-6)


def test_scores_keep_their_differences():
    after = moved_to(-3.0, torch.tensor([[10.0, 12.0]]), SCORE)
    torch.testing.assert_close(after, torch.tensor([[-4.0, -2.0]]))


def test_equal_thresholds_take_the_value_itself_and_the_ends_hold_for_all():
    equal = torch.full((2, 3), 0.9)
    assert torch.equal(moved_to(0.1, equal, CONFIDENCE), torch.full((2, 3), 0.1))
    for value in (0.0, math.inf):
        differing = torch.tensor([[0.9, 0.8], [0.2, 0.1]])
        assert torch.equal(moved_to(value, differing, CONFIDENCE), torch.full((2, 2), value))


def test_an_exit_that_is_off_stays_off_unless_all_are():
    inf = math.inf
    assert moved_to(0.5, torch.tensor([0.9, inf]), CONFIDENCE).tolist() == [0.5, inf]
    assert moved_to(0.5, torch.tensor([0.9, -inf]), ENTROPY).tolist() == [0.5, -inf]
    assert moved_to(0.5, torch.tensor([inf, inf]), CONFIDENCE).tolist() == [0.5, 0.5]


def test_the_sweep_moves_the_thresholds_it_is_given(digits, trained):
    """At the chosen point the model must have the accuracy and FLOPs of the sweep."""
    model = copy.deepcopy(trained)
    table = exit_table(model, batches(digits.validation))
    spread = torch.linspace(-1.0, 1.0, 10)
    centre = table.statistic[0].median().logit()
    model.thresholds = torch.stack([(centre + spread).sigmoid(), (centre - spread).sigmoid()])
    flops = count_flops(model, digits.test.images[:1])
    for value in (0.5, 0.6):
        (point,) = one_number.sweep(table, flops, [value], thresholds=model.thresholds)
        one_number.set_threshold(model, value)
        assert model.thresholds.shape == (2, 10) and len(model.thresholds.unique()) >= 10
        out = predict(model, digits.validation.images)
        exits = torch.bincount(out.exit_index, minlength=3).tolist()
        assert min(exits) > 1
        assert point.flops == pytest.approx(flops.mean(exits))


def test_what_cannot_be_swept_or_set_is_refused(digits, trained):
    table = exit_table(trained, batches(digits.validation))
    flops = count_flops(trained, digits.test.images[:1])
    with pytest.raises(ValueError, match="table: expected at least one sample, got none"):
        one_number.sweep(exit_table(trained, []), flops)
    with pytest.raises(ValueError, match=r"thresholds: expected \[2\] or \[2, C\], got a float32"):
        one_number.sweep(table, flops, [0.5], thresholds=torch.tensor([0.5]))
    with pytest.raises(ValueError, match="points, max_flops: expected points and a number, got 0"):
        one_number.choose([])
    with pytest.raises(ValueError, match="points, max_flops: .* and nan"):
        one_number.choose([OperatingPoint(0.5, 0.9, 1.0)], math.nan)
    model = copy.deepcopy(trained)
    model.thresholds = [0.5, 0.6]
    with pytest.raises(ValueError, match=r"value: expected values in \[0, 1\], .* got 2.0"):
        one_number.set_threshold(model, 2.0)
    most = torch.finfo(torch.float32).max
    assert moved_to(-most, torch.tensor([-1.0, 1.0]), SCORE).isfinite().all()
