"""What is certified holds on new data, with the probability that was asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from policy_cases import FLOPS, GROUPS, made

from elf_fast.policy import ExitTable, choose
from elf_fast.policy.guarantee import Limit, Outcome, certified, p_value, samples_needed

TRIALS = 1000
#: The largest share of 1,000 trials that fail with probability 0.05, exceeded once in 1,000.
ALLOWED = 0.073


def path(losses: np.ndarray, weights: np.ndarray, n: int, seed: int = 0) -> Outcome:
    """Outcomes [P, TRIALS] of samples of n each. losses [P, M]: of each kind of sample, in
    {-1, 0, 1}; weights [M]: how frequent the kinds are."""
    counts = np.random.default_rng(seed).multinomial(n, weights, TRIALS)  # [TRIALS, M]
    return Outcome((losses > 0) @ counts.T, (losses < 0) @ counts.T, n)


@pytest.mark.parametrize("n", [400, 2000, 20_000])
@pytest.mark.parametrize("gains", [0.0, 0.03])
def test_a_drop_just_above_the_limit_is_rarely_certified(n, gains):
    """The first candidate changes nothing, the second drops by a hair more than allowed."""
    drop = 0.02
    harms = drop + gains + 1e-9
    losses = np.array([[0, 0, 0], [1, -1, 0]])
    outcome = path(losses, np.array([harms, gains, 1 - harms - gains]), n)
    found = certified([Limit(drop, outcome)], 0.95)
    assert found.shape == (TRIALS,) and (found >= 1).all()
    assert (found == 2).mean() <= ALLOWED
    # The drop that was seen is within the limit in half of the trials: a test that only compared
    # the two would certify these.
    naive = (outcome.harms[1] - outcome.gains[1]) / n <= drop
    assert naive.mean() > 0.35


@pytest.mark.parametrize("gains", [0.0, 0.02])
def test_a_drop_well_within_the_limit_is_certified(gains):
    losses = np.array([[1, -1, 0]])
    weights = np.array([0.005 + gains, gains, 0.995 - 2 * gains])
    found = certified([Limit(0.02, path(losses, weights, 10_000))], 0.95)
    assert (found == 1).mean() > 0.95


def test_a_path_and_two_limits_hold_together():
    """Candidates with rising drops, on all samples and on a group: the last certified one breaks a
    limit in at most 5% of the trials."""
    steps = 12
    harms = np.linspace(0, 0.06, steps)
    generator = np.random.default_rng(1)
    n, few = 2000, 400
    group = generator.multinomial(few, [1 / steps / 10] * steps + [0.9], TRIALS)
    rest = generator.multinomial(n - few, [0.002] * steps + [1 - 0.002 * steps], TRIALS)
    # A sample of kind k is harmed from candidate k on.
    few_harms = group[:, :steps].cumsum(1).T
    all_harms = few_harms + rest[:, :steps].cumsum(1).T
    limits = [Limit(0.02, Outcome(all_harms, 0 * all_harms, n)),
              Limit(0.045, Outcome(few_harms, 0 * few_harms, few))]  # fmt: skip
    true_few = (np.arange(steps) + 1) / steps / 10
    true_all = (few * true_few + (n - few) * 0.002 * (np.arange(steps) + 1)) / n
    breaks = (true_all > 0.02) | (true_few > 0.045)
    found = certified(limits, 0.95)
    assert 0 < breaks.argmax() < steps and breaks[breaks.argmax() :].all()
    assert (found > breaks.argmax()).mean() <= ALLOWED
    assert (found > 0).mean() > 0.5 and harms[-1] > 0
    # One limit alone lets more through.
    assert certified(limits[:1], 0.95).mean() > found.mean()


def test_exits_that_were_certified_hold_on_new_data():
    """End to end: thresholds chosen and certified on 1,000 samples, their drop on 5,000 others."""
    population = made(5000, seed=9)
    off = population.correct[-1].double().mean()
    broken = []
    for seed in range(8):
        policy = choose(made(1000, seed=seed), FLOPS, max_drop=0.03, guarantee=0.9)
        table = population.changed(temperatures=policy.temperatures)
        index = table.exit_index(torch.tensor(policy.thresholds))
        right = table.correct.gather(0, index[None])[0]
        broken.append(float(off - right.double().mean()) > 0.03)
        assert policy.measured.samples == 500
    assert sum(broken) <= 3  # of 8 at probability 0.1: more once in 200 times


def test_more_samples_certify_more_and_the_few_are_tested_apart():
    table = made(4000, seed=3)
    some = table.rows(torch.arange(1000))
    costs = [choose(t, FLOPS, max_drop=0.02, guarantee=0.95).measured.flops_share
             for t in (some, table)]  # fmt: skip
    assert costs[1] < costs[0]
    both = choose(table, FLOPS, max_drop=0.02, few_drop=0.01, guarantee=0.95, groups=GROUPS)
    assert both.measured.flops_share > costs[1]
    with pytest.raises(ValueError, match="samples of the group few in the half"):
        choose(table, FLOPS, max_drop=0.02, few_drop=0.001, guarantee=0.95, groups=GROUPS)


def test_exits_stay_off_if_nothing_can_be_certified():
    """The first exit is sure and wrong, the second never differs enough to be tested."""
    N = 1000
    target = torch.arange(N) % 2
    z = torch.zeros(2, N, 2)
    z[1, torch.arange(N), target] = 3.0
    wrong = torch.arange(N) % 10 == 0  # the surest of the first exit
    z[0, torch.arange(N), target] = torch.where(wrong, -9.0, 2.0 + torch.arange(N) / N)
    policy = choose(ExitTable.from_logits(z, target), [0.4, 1.0], max_drop=0.1, guarantee=0.95)
    assert policy.is_off and policy.measured.drop == 0


def test_the_p_value_against_its_definition():
    from scipy.stats import binom

    level, drop = 0.05, 0.02
    harms, gains, n = 12, 10, 1000
    d_max = max(d for d in np.linspace(0.02, 0.06, 40_001) if binom.cdf(22, n, d) >= level / 4)
    expected = level / 4 + binom.cdf(12, 22, (1 + drop / d_max) / 2)
    assert p_value(Outcome(harms, gains, n), drop, level) == pytest.approx(expected, abs=1e-3)
    assert p_value(Outcome(0, 0, 10_000), drop, level) == pytest.approx(level / 4)
    assert p_value(Outcome(50, 0, 100), drop, level) > 0.99
    assert p_value(Outcome(100, 0, 100), drop, level) > 0.99
    for drop in (0.5, 0.01, 0.001):
        needed = samples_needed(drop, level)
        assert p_value(Outcome(0, 0, needed), drop, level) <= level
        assert p_value(Outcome(0, 0, needed - 1), drop, level) > level
