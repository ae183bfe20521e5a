"""The simulator of replicas agrees with the scheduler, and shows what is known without it."""

from __future__ import annotations

import argparse

import pytest

from benchmarks import serving_simulation as simulation
from benchmarks.serving_simulation import Settings, Workload, compare, poisson, simulate
from elf_fast.inference.stage_times import interpolated

SHARES = [0.5, 0.25, 0.25]
#: Milliseconds of three stages by batch size.
FIXED = {1: [4.0, 4.0, 4.0], 64: [8.0, 8.0, 8.0]}
LINEAR = {1: [0.2, 0.2, 0.2], 64: [12.8, 12.8, 12.8]}
MIXED = {1: [1.0, 1.5, 2.0], 8: [2.0, 3.0, 4.0], 64: [10.0, 12.0, 14.0]}


def load(times, share, requests=400, replicas=1, max_batch=64) -> Workload:
    most = simulation.capacity(interpolated(times, max_batch), SHARES, max_batch)
    return poisson(share * most * replicas, requests, SHARES, seed=1)


@pytest.mark.parametrize("settings", [Settings(), Settings(16, 20), Settings(64, 5, False)])
@pytest.mark.parametrize("share", [0.5, 0.95, 3.0])
@pytest.mark.parametrize("times", [FIXED, LINEAR, MIXED], ids=["fixed", "linear", "mixed"])
def test_it_agrees_with_the_scheduler(times, share, settings):
    said, done = compare(load(times, share), times, settings)
    for name in ("images_per_s", "p50_ms", "p99_ms", "fill"):
        assert getattr(said, name) == pytest.approx(getattr(done, name), rel=0.1), name


def test_one_request_takes_the_time_of_its_stages():
    workload = Workload([0.0, 1.0], [[2, 0], [1]])
    seconds = interpolated(FIXED, 64)
    found = simulate(workload, seconds)
    first = 1e3 * (seconds[0][2] + seconds[1][1] + seconds[2][1])
    second = 1e3 * (seconds[0][1] + seconds[1][1])
    assert found.p50_ms == pytest.approx((first + second) / 2)


def test_overloaded_replicas_reach_their_capacity_and_no_more():
    for replicas in (1, 3):
        workload = load(FIXED, 2.0, 3000, replicas)
        seconds = interpolated(FIXED, 64)
        found = simulate(workload, seconds, Settings(max_wait_ms=100), replicas=replicas)
        most = replicas * simulation.capacity(seconds, SHARES, 64)
        assert 0.95 * most < found.images_per_s < 1.03 * most


def test_refilling_pays_where_a_full_batch_is_cheaper_and_costs_nothing_elsewhere():
    for times, gain in ((FIXED, 1.25), (LINEAR, 1.0)):
        workload, seconds = load(times, 2.0, 1500), interpolated(times, 64)
        found = simulate(workload, seconds, Settings(max_wait_ms=40))
        without = simulate(workload, seconds, Settings(refill=False))
        assert found.images_per_s >= gain * without.images_per_s


@pytest.mark.parametrize("times", [FIXED, LINEAR, MIXED], ids=["fixed", "linear", "mixed"])
def test_refilling_costs_little_at_low_load(times):
    workload, seconds = load(times, 0.3, 1500), interpolated(times, 64)
    found, without = (simulate(workload, seconds, Settings(refill=on)) for on in (True, False))
    assert found.p50_ms < 1.03 * without.p50_ms and found.p99_ms < 1.05 * without.p99_ms


def test_the_least_loaded_replica_is_a_better_choice_than_the_next():
    workload, seconds = load(MIXED, 0.8, 3000, replicas=4), interpolated(MIXED, 64)
    p99 = [
        simulate(workload, seconds, replicas=4, router=router).p99_ms
        for router in simulation.ROUTERS
    ]
    assert p99[1] < p99[0]


def test_the_table_has_a_line_for_every_case():
    lines: list[str] = []
    options = argparse.Namespace(
        replicas=[1, 2], loads=[0.5], max_batch=64, max_wait_ms=5.0, requests=100
    )
    simulation.show(MIXED, SHARES, options, lines.append)
    assert len(lines) == 2 + 2 + 4 and "least loaded" in lines[-1]
