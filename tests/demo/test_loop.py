"""The demo's training loop."""

from __future__ import annotations

import pytest
import torch

from elf_fast.demo.loop import Schedule, learning_rate_factor, train
from elf_fast.runs import demo_network as network


def test_the_learning_rate_rises_then_falls_to_zero():
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(101)]
    assert factors[9] == 1.0 and factors[100] == pytest.approx(0.0)
    assert factors[:10] == sorted(factors[:10]) and factors[10:] == sorted(factors[10:])[::-1]
    assert learning_rate_factor(0, 1, 0.1) == 1.0


@pytest.mark.parametrize("make", [network.with_exits, network.without_exits])
def test_training_learns_and_repeats(digits, make):
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = make(10, widths=(4, 8, 8))
        history = train(model, digits.train, Schedule(epochs=3), seed=0)
        runs.append((history, model.state_dict()))
    (history, state), (again, state_again) = runs
    assert history == again
    assert all(torch.equal(state[name], state_again[name]) for name in state)
    assert [s.epoch for s in history] == [1, 2, 3] and history[-1].loss < history[0].loss
    assert all(sum(s.exit_shares) == pytest.approx(1) for s in history)
    assert not model.training
