"""Policies chosen on tables and on networks."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from policy_cases import FLOPS, GROUPS, made

from elf_fast import ELF, criteria
from elf_fast.demo.loop import batches, predict
from elf_fast.flops import count_flops
from elf_fast.policy import (
    ExitTable,
    Policy,
    calibrate,
    choose,
    costs,
    observe,
    shares,
    temperatures,
)
from elf_fast.policy.one_number import candidates_of
from elf_fast.policy.search import Goal, Problem, frontier, improve, search


@pytest.fixture(scope="module")
def table() -> ExitTable:
    return made()


def outcome(table: ExitTable, policy: Policy) -> tuple[float, float]:
    """Accuracy and FLOPs by the table itself."""
    table = table.changed(criterion=policy.criterion, temperatures=policy.temperatures)
    index = table.exit_index(torch.tensor(policy.thresholds))
    right = table.correct.gather(0, index[None])[0]
    return right.double().mean().item(), torch.tensor(FLOPS, dtype=torch.float64)[
        index
    ].mean().item()


# The search


@pytest.mark.parametrize("per", ["exit", "class", "group"])
@pytest.mark.parametrize("limit", [0.45, 0.6, 0.8])
def test_the_search_keeps_the_budget_and_beats_its_starts(table, per, limit):
    policy = choose(table, FLOPS, max_flops=limit, per=per, groups=GROUPS)
    accuracy, cost = outcome(table, policy)
    assert policy.measured.accuracy.value == pytest.approx(accuracy)
    assert policy.measured.flops_share == pytest.approx(cost)
    assert cost <= limit + 1e-9
    calibrated = table.changed(temperatures=policy.temperatures)
    problem = Problem(calibrated, FLOPS)
    for family in (candidates_of(calibrated), shares.geometric(calibrated)):
        values = [problem.value(problem.of_tensor(t)) for t in family]
        assert accuracy >= max(v.accuracy for v in values if v.cost <= limit) - 1e-9
    assert choose(table, FLOPS, max_flops=limit, per=per, groups=GROUPS) == policy


def test_the_search_finds_the_best_of_all_cuts_of_a_small_table():
    """Of two exits, against every pair of cuts."""
    for seed in range(5):
        table = made(24, C=3, seed=seed)
        problem = Problem(table, FLOPS, candidates=24)
        cuts = [torch.cat([s.sort().values, torch.tensor([math.inf])]) for s in table.statistic[:2]]
        for goal in (Goal(most=0.6), Goal(least=problem.value(problem.never()).accuracy)):
            pairs = [torch.stack([a, b]) for a in cuts[0] for b in cuts[1]]
            best = max(goal.rank(problem.value(problem.of_tensor(t))) for t in pairs)
            starts = [problem.of_tensor(t) for t in candidates_of(table)]
            found = goal.rank(problem.value(search(problem, goal, starts)))
            assert found[0] == 0 and found[1] >= best[1] - 1.5 / 24  # within one sample and a half
            # No single threshold can be improved.
            assert improve(problem, search(problem, goal), goal) is not None


def test_what_a_step_promises_is_what_it_gives(table):
    """`improve` adds up gains; the rank it ends with is that of the thresholds."""
    problem = Problem(table, FLOPS, cells=torch.arange(10).expand(2, 10) % 3)
    ranks = []
    for start in frontier(problem)[:10]:
        goal = Goal(most=0.65)
        better = improve(problem, start, goal)
        ranks.append((goal.rank(problem.value(start)), goal.rank(problem.value(better))))
        as_tensor = problem.as_tensor(better)
        index = table.exit_index(as_tensor).numpy()
        assert (index == problem.exit_index(better)).all()
    assert all(before <= after for before, after in ranks) and any(a < b for a, b in ranks)


def test_the_gains_of_leaving_at_an_exit_count_who_left_before(table):
    from elf_fast.policy.search import gains_of_leaving

    problem = Problem(table, FLOPS)
    start = problem.of_tensor(table.statistic[:2].median(1).values)
    right, cost = gains_of_leaving(problem, [start[0], start[1] + math.inf], 1)
    before = problem.value([start[0], start[1] + math.inf])
    after = problem.value([start[0], start[1] * 0 - 1])
    leaves = problem.leaves([start[0], start[1] * 0 - 1], 1)
    assert before.accuracy + right[leaves].sum() / 600 == pytest.approx(after.accuracy)
    assert before.cost + cost[leaves].sum() / 600 == pytest.approx(after.cost)


def test_ties_go_to_the_cheaper_and_nan_never_leaves():
    right = torch.ones(2, 6, dtype=torch.int64)
    statistic = torch.tensor([[0.9, 0.8, 0.7, 0.6, math.nan, 0.5], [1.0] * 6])
    table = ExitTable(statistic, right, right[0], criteria.by_name("confidence"))
    policy = choose(table, [0.3, 1.0])
    assert policy.thresholds == (0.0,)
    assert policy.measured.exits[1].share.value == pytest.approx(1 / 6)
    entropy = table._replace(criterion=criteria.by_name("entropy"))
    assert choose(entropy, [0.3, 1.0]).thresholds == (1.0,)


# Limits


def test_the_least_compute_within_a_drop_overall_and_of_the_few(table):
    policy = choose(table, FLOPS, max_drop=0.02, groups=GROUPS)
    drop = policy.measured.drop
    assert drop <= 0.02 + 1e-9
    strict = choose(table, FLOPS, max_drop=0.0, groups=GROUPS)
    assert strict.measured.drop <= 1e-9
    assert policy.measured.flops_share < strict.measured.flops_share < 1.05
    few = choose(table, FLOPS, max_drop=0.05, few_drop=0.01, groups=GROUPS).measured.groups["few"]
    assert few.accuracy_exits_off.value - few.accuracy.value <= 0.01 + 1e-9
    loose = choose(table, FLOPS, max_drop=0.05, groups=GROUPS).measured.groups["few"]
    assert loose.accuracy_exits_off.value - loose.accuracy.value > 0.01


def test_milliseconds_decide_where_they_are_asked_for(table):
    ms = [5.0, 6.0, 7.0]  # the first exit is dear, although its FLOPs are few
    policy = choose(table, FLOPS, max_ms=6.0, ms=ms, batch=4, device="cpu")
    assert policy.measured.ms <= 6.0 + 1e-9
    assert (policy.promise.aim, policy.promise.batch, policy.promise.device) == ("max_ms", 4, "cpu")
    shares_ = [e.share.value for e in policy.measured.exits]
    assert policy.measured.ms == pytest.approx(sum(a * b for a, b in zip(ms, shares_, strict=True)))


def test_exit_shares_and_the_geometric_family(table):
    policy = choose(table, FLOPS, exit_shares=[0.5, 0.3, 0.2])
    assert [e.share.value for e in policy.measured.exits] == pytest.approx(
        [0.5, 0.3, 0.2], abs=0.01
    )
    assert shares.geometric_shares(0.5, 3) == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert shares.geometric_shares(2.0, 3) == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    family = shares.geometric(table)
    firsts = [(table.exit_index(t) == 0).double().mean().item() for t in family]
    assert firsts == sorted(firsts, reverse=True) and firsts[0] > 0.9 and firsts[-1] < 0.1


def test_criteria_are_compared_on_the_same_table(table):
    policy = choose(table, FLOPS, max_flops=0.6, criterion="auto")
    assert [t.criterion for t in policy.tried] == list(criteria.TABLE)
    alone = {
        name: choose(table, FLOPS, max_flops=0.6, criterion=name).measured.accuracy.value
        for name in criteria.TABLE
    }
    assert {t.criterion: t.accuracy for t in policy.tried} == pytest.approx(alone)
    assert policy.measured.accuracy.value == max(alone.values()) == alone[policy.criterion]

    def energy(z: torch.Tensor) -> torch.Tensor:
        return z.logsumexp(1)

    own = choose(table, FLOPS, max_flops=0.6, criterion=energy)
    assert own.criterion is energy and own.measured.flops_share <= 0.6 + 1e-9


def test_temperatures_maximise_the_likelihood(table):
    found = temperatures.fit(table)
    for e, T in enumerate(found):
        z = table.logits[e]

        def loss(t: float, z=z) -> float:
            return float(torch.nn.functional.cross_entropy(z / t, table.target))

        assert loss(T) <= min(loss(T * 0.98), loss(T * 1.02), loss(1.0)) + 1e-6
    twice = ExitTable.from_logits(table.logits * 2, table.target)
    assert temperatures.fit(twice) == pytest.approx([2 * T for T in found], rel=1e-3)
    with pytest.raises(ValueError, match="table: expected one that holds logits"):
        temperatures.fit(table._replace(logits=None))


def test_rare_classes_share_a_threshold_and_unseen_ones_have_one(table):
    rare = table.rows(torch.arange(80))
    policy = choose(rare, FLOPS, max_flops=0.6, per="class")
    assert all(len(row) == 10 for row in policy.thresholds)
    frequent = torch.bincount(rare.prediction[0], minlength=10) >= 20
    assert len({t for t, f in zip(policy.thresholds[0], frequent, strict=True) if not f}) == 1


# On a network


def test_a_network_does_what_its_policy_says(digits, trained):
    model = copy.deepcopy(trained)
    before = copy.deepcopy(model.state_dict())
    counts = [150, 120, 100, 80, 60, 40, 30, 20, 15, 10]
    policy = calibrate(model, batches(digits.validation), max_flops=0.7, class_counts=counts)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert set(policy.measured.groups) == {"many", "medium", "few"}
    model.apply_policy(policy)
    out = predict(model, digits.validation.images)
    found = torch.bincount(out.exit_index, minlength=3) / 200
    assert found.tolist() == pytest.approx([e.share.value for e in policy.measured.exits])
    accuracy = (out.prediction == digits.validation.targets).double().mean().item()
    assert accuracy == pytest.approx(policy.measured.accuracy.value)
    flops = count_flops(model, digits.test.images[:1])
    spent = flops.mean(torch.bincount(out.exit_index, minlength=3).tolist()) / flops.without_exits
    assert spent == pytest.approx(policy.measured.flops_share) and spent <= 0.7
    seen = observe(model, batches(digits.validation))
    again = calibrate(trained, seen, max_flops=0.7, class_counts=counts)
    assert again == policy


def test_milliseconds_are_those_of_this_device(digits, trained):
    ms = costs.milliseconds(trained, digits.test.images[:8], seconds=0.1)
    assert len(ms) == 3 and 0 < ms[0] <= ms[1] <= ms[2]
    policy = calibrate(trained, batches(digits.validation), max_ms=1000.0, batch=3)
    assert policy.promise.batch == 3 and 0 < policy.measured.ms < 1000


# Wrong calls

WRONG = [
    ({"max_flops": 0.3}, ValueError, r"max_flops: expected at least 0.4 \(all leave at the first"),
    ({"max_flops": -1.0}, ValueError, "max_flops: expected a finite number >= 0"),
    ({"max_flops": "much"}, TypeError, "max_flops: expected a number, got 'much'"),
    ({"max_flops": math.nan}, ValueError, "max_flops: expected a finite number >= 0.0, got nan"),
    ({"max_ms": 2.0}, ValueError, "max_ms: expected the argument ms beside it, got none and 2.0"),
    ({"max_ms": 2.0, "ms": [3.0, 4, 5]}, ValueError, r"max_ms: expected at least 3 ms "),
    ({"max_ms": 2.0, "ms": [3.0]}, ValueError, "ms: expected 3 numbers, one per exit"),
    ({"max_flops": 0.5, "max_drop": 0.1}, ValueError, "max_drop: expected one limit alone, got "
     "max_flops, too"),
    ({"max_drop": 1.5}, ValueError, r"max_drop: expected a number in \[0.0, 1.0\], got 1.5"),
    ({"few_drop": 0.1}, ValueError, "few_drop: expected max_drop, too, got none"),
    ({"max_drop": 0.1, "few_drop": 0.1}, ValueError, "groups: expected classes in the group 'few'"),
    ({"guarantee": 0.9}, ValueError, "guarantee: expected max_drop, too, got none"),
    ({"max_drop": 0.1, "guarantee": 1.0}, ValueError, r"guarantee: expected a probability in \(0"),
    ({"max_drop": 0.01, "guarantee": 0.95}, ValueError, "guarantee: expected at least 437 samples "
     "in the half that tests, to certify max_drop 0.01 with probability 0.95, got 300"),
    ({"max_drop": 0.0, "guarantee": 0.95}, ValueError, "max_drop: expected a drop above 0 with "),
    ({"per": "image"}, ValueError, "per: expected exit, class or group, got 'image'"),
    ({"per": "group"}, ValueError, "groups: expected classes by group with per='group'"),
    ({"per": "group", "groups": {"a": [0, 1], "b": [1]}}, ValueError, "groups: expected every"),
    ({"per": "group", "groups": {"a": [10]}}, ValueError, r"groups\['a'\]: expected an integer in"),
    ({"exit_shares": [0.5, 0.5]}, ValueError, "exit_shares: expected 3 shares of at least 0"),
    ({"exit_shares": [0.5, 0.5, 0.5]}, ValueError, "exit_shares: expected 3 shares"),
    ({"exit_shares": 0.5}, TypeError, "exit_shares: expected 3 shares, got 0.5"),
    ({"exit_shares": [1, 0, 0], "per": "class"}, ValueError, "per: expected 'exit' with"),
    ({"criterion": "luck"}, ValueError, "criterion: expected one of confidence, margin, entropy"),
    ({"criterion": []}, ValueError, "criterion: expected at least one, got none"),
]  # fmt: skip


@pytest.mark.parametrize("options, error, message", WRONG, ids=[str(w[0])[:40] for w in WRONG])
def test_a_wrong_call_says_what_was_expected(table, options, error, message):
    with pytest.raises(error, match=message):
        choose(table, FLOPS, **options)


def test_wrong_tables_and_networks_are_refused(table, digits, trained):
    with pytest.raises(ValueError, match="flops: expected 3 numbers, one per exit"):
        choose(table, [0.5, 1.0])
    with pytest.raises(ValueError, match="table: expected a network with early exits"):
        choose(ExitTable.from_logits(table.logits[:1], table.target), [1.0])
    with pytest.raises(ValueError, match="table: expected at least one sample, got none"):
        choose(table.rows(torch.arange(0)), FLOPS)
    with pytest.raises(ValueError, match="table: expected one that holds logits, got one without"):
        choose(table._replace(logits=None), FLOPS, criterion="auto")
    with pytest.raises(TypeError, match="model: expected an ELF, got 'model'"):
        calibrate("model", [])
    with pytest.raises(ValueError, match="loader: expected at least one sample, got none"):
        calibrate(trained, [])
    with pytest.raises(TypeError, match="budget: expected one of criterion, data_digest, "):
        calibrate(trained, batches(digits.validation), budget=0.5)
    with pytest.raises(ValueError, match="batch: expected an integer >= 1, got 0"):
        calibrate(trained, batches(digits.validation), max_ms=5.0, batch=0)
    assert isinstance(trained, ELF)
