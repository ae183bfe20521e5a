"""The learning rate."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from run_cases import DIGITS

pytest.importorskip("timm")

from elf_fast.training import schedule


def test_the_learning_rate_follows_its_schedule():
    cosine = replace(DIGITS, epochs=10, warmup_epochs=2, lr=0.5, min_lr=0.1)
    rates = [schedule.learning_rate(cosine, step, 5) for step in range(50)]
    assert rates[:10] == pytest.approx([0.5 * (k + 1) / 10 for k in range(10)])
    expected = [0.1 + 0.4 * (1 + math.cos(math.pi * (k - 10) / 40)) / 2 for k in range(10, 50)]
    assert rates[10:] == pytest.approx(expected)
    steps = replace(cosine, sched="step", decay_milestones=(4, 6), decay_rate=0.1)
    rates = [schedule.learning_rate(steps, step, 5) for step in (9, 10, 19, 20, 29, 30, 49)]
    assert rates == pytest.approx([0.5, 0.5, 0.5, 0.05, 0.05, 0.005, 0.005])
