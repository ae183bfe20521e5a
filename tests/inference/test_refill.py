"""The rule which batch runs next, with times written out."""

from __future__ import annotations

import math

import pytest

from elf_fast.inference.refill import Refill
from elf_fast.inference.stage_times import interpolated, measure_stages


class Waiting(list):
    """n samples that came at `oldest`."""

    def __init__(self, n: int, oldest: float = 0.0, deadline: float = math.inf) -> None:
        super().__init__(range(n))
        self.oldest, self.deadline = oldest, deadline

    def earliest_deadline(self) -> float:
        return self.deadline


def rule(milliseconds, max_batch=8, **settings) -> Refill:
    settings = {"max_wait": 1e6, "refill": True} | settings
    return Refill(interpolated(milliseconds, max_batch), max_batch, **settings)


FIXED = {1: [4.0, 4.0], 8: [4.0, 4.0]}


def test_the_gain_is_that_of_the_formula():
    """m = 2 are held for n = 8, half of which go on: S = 4 ms, and t_u = 4 ms delays two samples.
    Those that meet them are j = 4, and R wait behind."""
    chooser = rule(FIXED)
    assert chooser.choose([Waiting(8), Waiting(2)], 0.0).stage == 0  # 4 S > 2 t_u
    assert chooser.choose([Waiting(8), Waiting(5)], 0.0).stage == 1  # 3 S < 5 t_u
    assert chooser.choose([Waiting(11), Waiting(5)], 0.0).stage == 0  # (3 + 3) S > 5 t_u


def test_shares_of_survivors_are_learnt():
    chooser = rule(FIXED)
    for n, survivors in ((8, 8), (8, 7), (4, 4)):
        chooser.left(0, n, survivors)
    assert chooser.shares[0] == pytest.approx((1 + 19) / (2 + 20))
    for _ in range(2000):
        chooser.left(0, 8, 0)
    assert chooser.shares[0] < 0.01
    # Nobody is expected to join the two.
    assert chooser.choose([Waiting(8), Waiting(2)], 0.0).stage == 1


def test_survivors_of_several_stages_are_expected():
    times = {1: [1.0, 1.0, 4.0], 8: [1.0, 1.0, 4.0]}
    chooser = rule(times)
    assert chooser.choose([Waiting(8), Waiting(0), Waiting(2)], 0.0).stage == 0  # j = 2, t_u = 2
    chooser.shares[1] = 0.0
    assert chooser.choose([Waiting(8), Waiting(0), Waiting(2)], 0.0).stage == 2  # j = 0


def test_nothing_waits():
    assert rule(FIXED).choose([Waiting(0), Waiting(0)], 0.0) == (None, math.inf)


def test_the_next_request_is_waited_for_only_at_a_known_rate():
    chooser = rule({1: [10.0], 8: [10.0]}, max_wait=0.005)
    now = 0.0
    for i in range(40):
        now += 0.001
        chooser.arrived(now, 1)
        assert (chooser.choose([Waiting(1, now)], now).stage is None) == (i >= Refill.REQUESTS)
    assert chooser.choose([Waiting(1, now)], now) == (None, pytest.approx(now + 0.001))
    assert chooser.choose([Waiting(1, now)], now, closing=True).stage == 0
    assert chooser.choose([Waiting(1, now - 0.005)], now).stage == 0
    assert chooser.choose([Waiting(8, now)], now).stage == 0
    assert chooser.choose([Waiting(1, now, now + 0.0105)], now).stage == 0
    # Nothing came for as long as the stage takes.
    assert chooser.choose([Waiting(1, now + 0.0099)], now + 0.01).stage == 0


def test_times_are_linear_between_the_measured_sizes():
    seconds = interpolated({2: [2.0], 4: [6.0], 8: [8.0]}, 10)[0]
    assert [1e3 * s for s in seconds] == pytest.approx([0, 0, 2, 4, 6, 6.5, 7, 7.5, 8, 8.5, 9])
    assert interpolated({4: [2.0]}, 2) == [[0.0, pytest.approx(0.0005), pytest.approx(0.001)]]


def test_stages_are_measured_up_to_the_largest_batch(one_thread):
    from inference.fake_engine import known_engine

    times = measure_stages(known_engine()[1], 12)
    assert sorted(times) == [1, 2, 4, 8, 12]
    assert all(len(row) == 3 and min(row) > 0 for row in times.values())
