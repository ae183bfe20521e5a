"""The scheduler: every request gets its own answer or its own error, batches are shared where that
pays, and waiting is bounded."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from concurrent.futures import CancelledError, wait
from contextlib import contextmanager

import pytest
import torch
from inference.fake_engine import FakeEngine, identities, known_engine, numbers
from inference.networks import assert_equal

from benchmarks.serving_simulation import Clock
from elf_fast.inference import (
    DeadlineExceeded,
    QueueFull,
    Request,
    Scheduler,
    SchedulerClosed,
    SchedulerCore,
)

pytestmark = pytest.mark.usefixtures("one_thread")
#: Milliseconds of the stages of `known_engine`, so that nothing is measured.
TIMES = {1: [1.0, 1.0, 1.0], 64: [2.0, 2.0, 2.0]}


class Injected(Exception):
    pass


class Watched:
    """An engine with things done before each stage. `before(e, x)` may raise."""

    def __init__(self, engine, before) -> None:
        self.engine, self.before = engine, before
        self.max_batch, self.stages = engine.max_batch, engine.stages
        self.stage_input = engine.stage_input

    def __call__(self, x):
        return self.engine(x)

    def run_stage(self, e, x):
        self.before(e, x)
        return self.engine.run_stage(e, x)


@pytest.fixture(scope="module")
def known():
    return known_engine()


def same(found, expected) -> bool:
    torch.testing.assert_close(found[:4], expected[:4])
    return True


def exits(*values: float) -> torch.Tensor:
    """Samples for `FakeEngine` that leave at these exits."""
    return torch.tensor(values, dtype=torch.float32)[:, None]


def fake_core(base, each, *, max_batch=8, **settings):
    """(core, engine) on one clock; the core knows the engine's times."""
    clock = Clock()
    engine = FakeEngine(clock, base, each, max_batch)
    settings = {"max_wait_ms": 1e6, "stage_times": engine.times} | settings
    return SchedulerCore(engine, max_batch=max_batch, clock=clock, **settings), engine


def drain(core) -> list[Request]:
    finished = []
    while core.waiting:
        finished += core.step()
    return finished + core.step()


# Answers


def test_100_000_images_with_deadlines_cancellations_and_failures(known):
    """Every request ends once, with its own answer or the error that it was due."""
    model, engine = known
    rng = random.Random(0)
    clock = Clock()
    failed_samples: set[int] = set()

    def before(e, x):
        clock.now += 2e-3
        if rng.random() < 0.01:
            failed_samples.update(numbers(x))
            raise Injected

    core = SchedulerCore(
        Watched(engine, before), max_batch=64, max_wait_ms=8, max_queue=600, clock=clock,
        stage_times=TIMES,
    )  # fmt: skip
    total, sent, first = 100_000, {}, 0
    cancelled, ended = set(), {}
    under_way: list[Request] = []

    def note(finished):
        for request in finished:
            assert request not in ended
            ended[request] = clock.now

    while first < total:
        for _ in range(rng.randrange(6)):
            k = min(rng.choice((1, 1, 2, 5, 16, 40)), total - first)
            deadline = clock.now + rng.choice((0.004, 0.02, 0.1)) if rng.random() < 0.2 else None
            if not k or not core.has_room(k):
                break
            request = Request(identities(first, k), deadline=deadline)
            core.add(request)
            sent[request] = range(first, first + k)
            under_way.append(request)
            first += k
        if rng.random() < 0.2 and under_way:
            request = under_way.pop(rng.randrange(max(0, len(under_way) - 50), len(under_way)))
            if core.cancel(request):
                cancelled.add(request)
        clock.now += rng.choice((0.0, 0.001, 0.004))
        note(core.step())
    while core.waiting:
        clock.now += 0.001
        note(core.step())
    note(core.take_finished())

    assert ended.keys() == sent.keys()
    expected = model(identities(0, total))
    outcomes = dict.fromkeys(("answered", "failed", "expired", "cancelled", "closed"), 0)
    for request, samples in sent.items():
        outcomes[request.outcome] += 1
        left = None if request.outcome == "answered" else request.left
        if request.left:
            own = list(samples) if left is None else [samples[i] for i in left]
            found = request.output(left)
            assert numbers(found.logits) == own
            rows = torch.tensor(own)
            assert torch.equal(found.exit_index, expected.exit_index[rows])
            assert torch.equal(found.prediction, expected.prediction[rows])
            torch.testing.assert_close(found.confidence, expected.confidence[rows])
        if request.outcome == "answered":
            assert request.error is None and sorted(request.left) == list(range(len(samples)))
            assert request.deadline is None or ended[request] < request.deadline
            assert failed_samples.isdisjoint(samples)
        elif request.outcome == "failed":
            assert type(request.error) is Injected
            assert not failed_samples.isdisjoint(samples)
        elif request.outcome == "expired":
            assert type(request.error) is DeadlineExceeded
            assert request.deadline <= ended[request]
        else:
            assert request in cancelled and request.error is None
    assert min(outcomes[name] for name in ("answered", "failed", "expired", "cancelled")) > 100
    assert outcomes["closed"] == 0 and outcomes["cancelled"] == len(cancelled)
    stats = core.stats()
    assert stats["requests"] == {"accepted": len(sent), "refused": 0} | outcomes
    assert stats["waiting"] == 0 and [s["waiting"] for s in stats["stages"]] == [0, 0, 0]
    assert sum(s["samples"] for s in stats["exits"]) == sum(len(r.left) for r in sent)


def test_several_threads_get_their_own_answers(known):
    model, engine = known
    expected = model(identities(0, 4000))
    wrong: list[int] = []

    def work(first):
        for i in range(first, first + 1000, 10):
            out = scheduler.submit(identities(i, 10)).result(timeout=30)
            if numbers(out.logits) != list(range(i, i + 10)):
                wrong.append(i)
            same(out, [value[i : i + 10] for value in expected[:4]])

    with Scheduler(engine, stage_times=TIMES, max_queue=35) as scheduler:
        threads = [threading.Thread(target=work, args=(1000 * i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    requests = scheduler.stats()["requests"]
    assert requests["accepted"] == requests["answered"] == 400


def test_values_and_types_are_those_of_the_model(known):
    model, engine = known
    x = identities(5, 200)
    with Scheduler(engine, stage_times=TIMES) as scheduler:
        found, empty = scheduler.submit(x), scheduler.submit(x[:0])
        assert same(found.result(), model(x)) and same(empty.result(), model(x[:0]))
        with torch.inference_mode():
            assert same(scheduler.submit(x[3:4]).result(), model(x[3:4]))
        wide = identities(5, 400)[::2].requires_grad_()
        assert same(scheduler.submit(wide).result(), model(wide.detach()))
    assert [v.dtype for v in found.result()[:4]] == [v.dtype for v in model(x)[:4]]
    assert not found.result().logits.requires_grad and found.result().loss is None


def test_compiled_stages_on_rows_in_the_middle_of_a_queue(compiled):
    model, x, engine = compiled("maps")
    with Scheduler(engine, max_batch=16, max_wait_ms=50) as scheduler:
        futures = [scheduler.submit(x[i : i + 3]) for i in range(0, 60, 3)]
        for i, future in enumerate(futures):
            assert_equal(future.result(60), model, x[3 * i : 3 * i + 3])


def test_the_input_may_change_after_it_was_accepted(known):
    model, engine = known
    core = SchedulerCore(engine, stage_times=TIMES)
    x = identities(0, 3)
    request = Request(x)
    core.add(request)
    x.zero_()
    drain(core)
    assert numbers(request.output().logits) == [0, 1, 2]


def test_thresholds_are_read_from_the_model(known):
    model, engine = known
    with Scheduler(engine, stage_times=TIMES) as scheduler:
        before = model.thresholds.clone()
        try:
            model.thresholds = float("inf")
            assert scheduler.submit(identities(0, 9)).result().exit_index.unique().tolist() == [2]
        finally:
            model.thresholds = before


def test_changed_weights_fail_requests():
    from elf_fast import ELF, ExitHead
    from elf_fast.inference import compile

    model = ELF([torch.nn.Linear(4, 4)] * 2, [ExitHead(4, 3), ExitHead(4, 3)]).eval()
    engine = compile(model, torch.randn(2, 4), engine="eager")
    with Scheduler(engine, stage_times={1: [1.0, 1.0]}) as scheduler:
        assert scheduler.submit(torch.randn(2, 4)).result().logits.shape == (2, 3)
        with torch.no_grad():
            model.stages[0].weight.add_(1)
        with pytest.raises(RuntimeError, match="whose weights have changed"):
            scheduler.submit(torch.randn(2, 4)).result()


def test_samples_are_answered_when_they_leave():
    core, engine = fake_core([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    told = []
    request = Request(exits(2, 0, 1, 0))
    request.on_exit = lambda indices, values: told.append(
        (engine.clock.now, indices, values.exit_index.tolist(), values.prediction.tolist())
    )
    core.add(request)
    assert core.step() == [] and request.left == [1, 3]
    assert request.output([3, 1]).prediction.tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"indices: expected samples that have left, got \[0, 2\]"):
        request.output()
    assert drain(core) == [request]
    assert told == [
        (pytest.approx(0.001), [1, 3], [0, 0], [0, 0]),
        (pytest.approx(0.002), [2], [1], [1]),
        (pytest.approx(0.003), [0], [2], [2]),
    ]
    assert request.output().exit_index.tolist() == [2, 0, 1, 0]


def test_on_exit_may_fail_its_request_only(known):
    model, engine = known
    seen = []

    def refuse(indices, values):
        raise Injected

    with Scheduler(engine, stage_times=TIMES) as scheduler:
        good = scheduler.submit(identities(0, 90), on_exit=lambda i, v: seen.append((i, v)))
        bad = scheduler.submit(identities(90, 90), on_exit=refuse)
        assert good.result().logits.shape == (90, 17)
        with pytest.raises(Injected):
            bad.result()
    assert sorted(i for indices, _ in seen for i in indices) == list(range(90)) and len(seen) > 2
    assert all(numbers(values.logits) == indices for indices, values in seen)


# Refilling


def overlapping(core, waves, size, deep):
    """Adds all waves at once; of each, `deep` samples go to the last exit."""
    for _ in range(waves):
        core.add(Request(exits(*[1.0] * deep, *[0.0] * (size - deep))))


def test_batches_are_refilled_across_requests_where_that_pays():
    fixed = ([4.0, 4.0], [0.1, 0.1])  # a large batch costs little more than a small one
    core, engine = fake_core(*fixed)
    overlapping(core, waves=8, size=8, deep=2)
    drain(core)
    deep = [n for e, n in engine.runs if e == 1]
    assert deep == [8, 6, 2] and core.stats()["stages"][1]["refilled"] == 2
    apart, alone = fake_core(*fixed, refill=False)
    overlapping(apart, waves=8, size=8, deep=2)
    drain(apart)
    assert [n for e, n in alone.runs if e == 1] == [2] * 8
    assert apart.stats()["stages"][1]["refilled"] == 0
    assert engine.clock.now < 0.8 * alone.clock.now


def test_nothing_is_held_where_time_is_proportional_to_samples():
    core, engine = fake_core([0.0, 0.0], [1.0, 1.0])
    overlapping(core, waves=8, size=8, deep=2)
    drain(core)
    assert [n for e, n in engine.runs if e == 1] == [2] * 8


def test_nothing_is_held_for_a_larger_batch_that_is_slower():
    clock = Clock()
    engine = FakeEngine(clock, [4.0, 4.0], [0.0, 0.0], 8)
    times = {1: [4.0, 1.0], 2: [4.0, 2.0], 8: [4.0, 40.0]}
    core = SchedulerCore(engine, max_batch=8, max_wait_ms=1e6, stage_times=times, clock=clock)
    overlapping(core, waves=8, size=8, deep=2)
    drain(core)
    assert [n for e, n in engine.runs if e == 1] == [2] * 8


def test_an_empty_first_queue_holds_nothing():
    core, engine = fake_core([4.0, 4.0], [0.1, 0.1])
    core.add(Request(exits(1.0, 0.0)))
    core.step()
    core.step()
    assert engine.runs == [(0, 2), (1, 1)] and not core.waiting


def test_batches_are_never_larger_than_max_batch(known):
    sizes = []
    engine = Watched(known[1], lambda e, x: sizes.append(len(x)))
    core = SchedulerCore(engine, max_batch=12, max_wait_ms=50, stage_times=TIMES)
    for i in range(40):
        core.add(Request(identities(25 * i, 25)))
        core.step()
    drain(core)
    assert max(sizes) == 12 and sum(sizes[:3]) == 36


# Waiting


def test_a_held_batch_runs_after_max_wait():
    """Without a bound the two samples would be held until the first queue is empty."""
    core, engine = fake_core([4.0, 4.0], [0.0, 0.0], max_wait_ms=11)
    overlapping(core, waves=8, size=8, deep=1)
    drain(core)
    # Held during two runs of 4 ms, not yet 11 ms, and during a third: 12 ms.
    assert engine.runs[:5] == [(0, 8)] * 4 + [(1, 4)]
    core, engine = fake_core([4.0, 4.0], [0.0, 0.0], max_wait_ms=0)
    overlapping(core, waves=8, size=8, deep=1)
    drain(core)
    assert engine.runs == [(0, 8), (1, 1)] * 8


def test_an_idle_engine_waits_for_requests_where_that_pays_and_not_longer_than_max_wait():
    core, engine = fake_core([10.0], [0.0], max_wait_ms=3)
    clock = engine.clock
    for _ in range(40):  # requests 0.5 ms apart
        clock.now += 0.0005
        core.add(Request(exits(0.0)))
        core.cancel(next(iter(core._open)))
    core.take_finished()
    core.add(Request(exits(0.0)))
    entered = clock.now
    assert core.step() == [] and engine.runs == []
    while not engine.runs:
        assert clock.now < core.wake <= entered + 0.003
        clock.now = core.wake
        core.step()
    assert clock.now - entered <= 0.003 + 0.010 + 1e-9


def test_a_deadline_wakes_a_loop_that_waits_for_requests():
    core, engine = fake_core([10.0], [0.0])
    for _ in range(40):
        engine.clock.now += 0.001
        core.add(Request(exits(0.0)))
        core.cancel(next(iter(core._open)))
    core.take_finished()
    request = Request(exits(0.0), deadline=engine.clock.now + 0.0002)
    core.add(request)
    assert core.step() == [] and core.wake == request.deadline
    engine.clock.now = core.wake
    assert core.step() == [request] and request.outcome == "expired"


def test_an_engine_with_little_to_do_waits_for_nothing():
    core, engine = fake_core([10.0], [0.0], max_wait_ms=3)
    for _ in range(5):
        engine.clock.now += 0.1
        core.add(Request(exits(0.0)))
        assert len(core.step()) == 1
    assert engine.runs == [(0, 1)] * 5


def test_a_deadline_ends_a_request_and_drops_its_samples():
    core, engine = fake_core([2.0, 2.0], [0.0, 0.0])
    late, other = Request(exits(0, 1, 1), deadline=0.003), Request(exits(1, 1))
    core.add(late)
    core.add(other)
    assert core.step() == []  # until 2 ms: one sample left
    engine.clock.now = 0.003
    assert core.step() == [late, other]
    assert engine.runs == [(0, 5), (1, 2)]  # the two samples of `late` did not run
    assert late.outcome == "expired" and type(late.error) is DeadlineExceeded
    assert str(late.error) == "deadline: 1 of 3 samples had left when it passed"
    assert late.output([0]).prediction.tolist() == [0]
    assert other.outcome == "answered" and core.waiting == 0


def test_an_answer_that_comes_after_the_deadline_is_an_error():
    core, _ = fake_core([2.0], [0.0])
    request = Request(exits(0), deadline=0.001)
    core.add(request)
    assert core.step() == [request] and request.outcome == "expired" and request.left == []


def test_a_batch_is_not_held_past_a_deadline():
    def first_runs(deadline):
        core, engine = fake_core([4.0, 4.0], [0.0, 0.0])
        core.add(Request(exits(*[1.0] * 2, *[0.0] * 6), deadline=deadline))
        overlapping(core, waves=4, size=8, deep=2)
        core.step()
        core.step()
        return engine.runs

    assert first_runs(None) == first_runs(1.0) == [(0, 8), (0, 8)]
    assert first_runs(0.010) == [(0, 8), (1, 2)]


def test_an_idle_scheduler_wakes_for_a_deadline():
    class Slow(threading.Event):
        def __call__(self, e, x):
            self.wait(10)

    slow = Slow()
    engine = Watched(known_engine()[1], slow)
    with Scheduler(engine, stage_times=TIMES, max_batch=1) as scheduler:
        first = scheduler.submit(identities(0, 1))
        second = scheduler.submit(identities(1, 1), deadline_ms=20)
        time.sleep(0.03)
        slow.set()
        assert numbers(first.result(5).logits) == [0]
        with pytest.raises(DeadlineExceeded):
            second.result(5)


def test_a_thread_that_waits_for_requests_wakes_after_max_wait(known):
    slow = {1: [1000.0] * 3, 64: [1000.0] * 3}  # so that waiting seems to pay
    with Scheduler(known[1], stage_times=slow, max_wait_ms=30) as scheduler:
        futures = [scheduler.submit(identities(i, 1)) for i in range(40)]
        assert [numbers(f.result(5).logits) for f in futures] == [[i] for i in range(40)]


# The queue


@contextmanager
def stuck(known, **settings):
    """A scheduler whose engine waits, and the event that lets it go on."""
    go, begun = threading.Event(), threading.Event()

    def before(e, x):
        begun.set()
        assert go.wait(20)

    scheduler = Scheduler(Watched(known[1], before), stage_times=TIMES, **settings)
    try:
        yield scheduler, go, begun
    finally:
        go.set()
        scheduler.shutdown()


def test_a_full_queue_refuses_or_blocks(known):
    with stuck(known, max_queue=4) as (scheduler, go, begun):
        futures = [scheduler.submit(identities(0, 3))]
        with pytest.raises(QueueFull, match=r"expected at most 1 samples.*max_queue = 4\), got 2"):
            scheduler.submit(identities(3, 2), block=False)
        start = time.monotonic()
        with pytest.raises(QueueFull, match="within timeout"):
            scheduler.submit(identities(3, 2), timeout=0.05)
        assert time.monotonic() - start >= 0.05
        with pytest.raises(DeadlineExceeded, match="before there was room"):
            scheduler.submit(identities(3, 2), deadline_ms=10)
        futures.append(scheduler.submit(identities(3, 1), block=False))
        threading.Timer(0.02, go.set).start()
        futures.append(scheduler.submit(identities(4, 4)))
        assert [numbers(f.result(5).logits) for f in futures] == [[0, 1, 2], [3], [4, 5, 6, 7]]
        with pytest.raises(ValueError, match="x: expected at most max_queue = 4 samples, got 5"):
            scheduler.submit(identities(0, 5))
    stats = scheduler.stats()["requests"]
    assert (stats["accepted"], stats["refused"], stats["answered"]) == (3, 3, 3)


def parked(scheduler, n):
    """Waits until n requests wait for room."""
    until = time.monotonic() + 5
    while len(scheduler._parked) < n:
        assert time.monotonic() < until
        time.sleep(0.001)


def test_whoever_waits_for_room_first_gets_it_first(known):
    with stuck(known, max_queue=4) as (scheduler, go, begun):
        scheduler.submit(identities(0, 3))
        threads = [
            threading.Thread(target=scheduler.submit, args=(identities(10 * k, k),))
            for k in (4, 1, 2)  # for the second there would be room
        ]
        for n, thread in enumerate(threads, 1):
            thread.start()
            parked(scheduler, n)
        with pytest.raises(QueueFull, match="expected no request that waits for room, got 3"):
            scheduler.submit(identities(0, 1), block=False)
        go.set()
        for thread in threads:
            thread.join(5)
            assert not thread.is_alive()
    assert scheduler.stats()["requests"]["answered"] == 4


def test_who_has_given_up_waiting_for_room_is_not_admitted(known):
    with stuck(known, max_queue=4) as (scheduler, go, begun):
        future = scheduler.submit(identities(0, 4))
        given_up = scheduler._accept(identities(4, 1), None, True, None)[2]
        assert given_up.admitted.cancel()
        go.set()
        future.result(5)
        assert numbers(scheduler.submit(identities(5, 1)).result(5).logits) == [5]
    assert scheduler.stats()["requests"]["accepted"] == 2


def test_room_is_there_when_samples_have_left():
    core, _ = fake_core([1.0, 1.0], [0.0, 0.0], max_queue=4)
    core.add(Request(exits(0, 0, 0, 1)))
    assert not core.has_room()
    with pytest.raises(QueueFull):
        core.add(Request(exits(0)))
    core.step()
    assert core.has_room(3) and not core.has_room(4)


@pytest.mark.parametrize(
    "x, message",
    [
        ([1, 2], "x: expected a tensor, got [1, 2] (list)"),
        (torch.zeros(3, 16), "x: expected a float32 tensor of shape [k, 17], got a float32 tensor"),
        (torch.zeros(3, 17).double(), "got a float64 tensor of shape [3, 17]"),
        (torch.zeros(()), "x: expected [k, ...] with k >= 1, got a float32 tensor of shape []"),
    ],
)
def test_a_bad_input_is_refused(known, x, message):
    with Scheduler(known[1], stage_times=TIMES) as scheduler:
        with pytest.raises((TypeError, ValueError)) as caught:
            scheduler.submit(x)
        assert message in str(caught.value)
        assert scheduler.submit(identities(1, 1)).result(5).logits.shape == (1, 17)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_batch": 65}, "max_batch: expected an integer in [1, 64], got 65"),
        ({"max_batch": 0}, "max_batch: expected an integer in [1, 64], got 0"),
        ({"max_wait_ms": -1}, "max_wait_ms: expected a finite number >= 0, got -1"),
        ({"max_queue": 0}, "max_queue: expected an integer >= 1, got 0"),
        ({"stage_times": {}}, "stage_times: expected a mapping from n to milliseconds"),
        ({"stage_times": {1: [1.0]}}, "stage_times: expected 3 milliseconds for n = 1"),
        ({"stage_times": {1: [1.0, 1.0, -1.0]}}, "stage_times: expected a finite number >= 0"),
    ],
)
def test_bad_settings_are_named(known, settings, message):
    before = threading.active_count()
    with pytest.raises((TypeError, ValueError)) as caught:
        Scheduler(known[1], **settings)
    assert message in str(caught.value) and threading.active_count() == before


def test_stage_times_are_measured(known):
    with Scheduler(known[1], max_batch=16) as scheduler:
        assert numbers(scheduler.submit(identities(1, 20)).result().logits) == list(range(1, 21))


# Cancellation, failures, shutdown


def test_cancelling_drops_what_has_not_left(known):
    ran = []
    with stuck(known, max_batch=4) as (scheduler, go, begun):
        scheduler._core._engine.before = lambda e, x: (
            begun.set(), go.wait(20), ran.extend(numbers(x))
        )  # fmt: skip
        kept = scheduler.submit(identities(0, 4))
        assert begun.wait(5)
        gone = scheduler.submit(identities(100, 6))
        other = scheduler.submit(identities(200, 3))
        assert gone.cancel() and gone.cancelled()
        go.set()
        assert numbers(kept.result(5).logits) == [0, 1, 2, 3]
        assert numbers(other.result(5).logits) == [200, 201, 202]
        with pytest.raises(CancelledError):
            gone.result()
    assert not set(ran) & set(range(100, 106))
    assert scheduler.stats()["requests"]["cancelled"] == 1 and scheduler.stats()["waiting"] == 0


def test_a_request_can_be_cancelled_while_it_runs(known):
    with stuck(known) as (scheduler, go, begun):
        gone, kept = (scheduler.submit(identities(i, 3)) for i in (0, 50))
        assert begun.wait(5) and gone.cancel()
        go.set()
        assert numbers(kept.result(5).logits) == [50, 51, 52]
    assert scheduler.stats()["requests"]["cancelled"] == 1


def test_what_was_cancelled_while_it_ran_goes_no_further():
    core, engine = fake_core([1.0, 1.0], [0.0, 0.0])
    gone, kept = Request(exits(1, 0, 1)), Request(exits(1))
    core.add(gone)
    core.add(kept)
    batch = core.begin()
    core.run(batch)
    assert core.cancel(gone) and not core.cancel(gone)
    core.end(batch)
    assert drain(core) == [gone, kept] and engine.runs == [(0, 4), (1, 1)]
    assert gone.outcome == "cancelled" and gone.left == [] and kept.outcome == "answered"


def test_a_failing_batch_fails_its_own_requests_only(known):
    def before(e, x):
        if 7 in numbers(x):
            raise Injected("seven")

    engine = Watched(known[1], before)
    core = SchedulerCore(engine, max_batch=4, max_wait_ms=0, stage_times=TIMES)
    requests = [Request(identities(i, 3)) for i in range(0, 30, 3)]
    for request in requests:
        core.add(request)
    drain(core)
    # 6, 7 and 8 are one request; the batches of 4 hold 4 to 7 (requests 1 and 2) or later ones.
    failed = [i for i, request in enumerate(requests) if request.outcome == "failed"]
    assert failed == [1, 2] and all(str(requests[i].error) == "seven" for i in failed)
    for i in set(range(10)) - set(failed):
        assert numbers(requests[i].output().logits) == list(range(3 * i, 3 * i + 3))
    assert core.waiting == 0


def test_shutdown_answers_what_was_accepted(known):
    scheduler = Scheduler(known[1], stage_times=TIMES, max_batch=4)
    futures = [scheduler.submit(identities(9 * i, 9)) for i in range(20)]
    scheduler.shutdown()
    assert all(f.done() for f in futures) and not scheduler._thread.is_alive()
    assert [numbers(f.result().logits)[0] for f in futures] == [9 * i for i in range(20)]
    with pytest.raises(SchedulerClosed, match="expected an open one"):
        scheduler.submit(identities(0, 1))
    scheduler.shutdown()


def test_shutdown_without_waiting_names_what_it_did_not_answer(known):
    with stuck(known, max_batch=4, max_queue=40) as (scheduler, go, begun):
        futures = [scheduler.submit(identities(8 * i, 8)) for i in range(5)]
        assert begun.wait(5)
        blocked = []

        def block():
            try:
                scheduler.submit(identities(0, 8))
            except SchedulerClosed as error:
                blocked.append(str(error))

        thread = threading.Thread(target=block)
        thread.start()
        parked(scheduler, 1)
        threading.Timer(0.02, go.set).start()
        scheduler.shutdown(wait=False)
        thread.join(5)
        for future in futures:
            with pytest.raises(SchedulerClosed, match="before it answered this request"):
                future.result(5)
        assert blocked == ["scheduler: was shut down"]
    assert scheduler.stats()["requests"]["closed"] == 5 and scheduler.stats()["waiting"] == 0


def test_an_error_in_a_with_block_does_not_wait_for_answers(known):
    with stuck(known) as (scheduler, go, begun):
        threading.Timer(0.02, go.set).start()
        with pytest.raises(Injected), scheduler:
            future = scheduler.submit(identities(0, 100))
            assert begun.wait(5)
            raise Injected
        with pytest.raises(SchedulerClosed):
            future.result(5)


def test_callers_are_answered_if_the_thread_fails(known, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    with stuck(known, max_queue=4) as (scheduler, go, begun):
        future = scheduler.submit(identities(0, 4))

        def broken(batch):
            raise Injected

        scheduler._core.end = broken
        go.set()
        with pytest.raises(Injected):
            future.result(5)
        scheduler._thread.join(5)
        with pytest.raises(SchedulerClosed):
            scheduler.submit(identities(0, 1))


def test_callbacks_of_futures_may_submit(known):
    done = threading.Event()
    chain: list[int] = []

    def again(future):
        chain.extend(numbers(future.result().logits))
        if len(chain) < 5:
            scheduler.submit(identities(len(chain), 1)).add_done_callback(again)
        else:
            done.set()

    with Scheduler(known[1], stage_times=TIMES) as scheduler:
        scheduler.submit(identities(0, 1)).add_done_callback(again)
        assert done.wait(5) and chain == [0, 1, 2, 3, 4]


# asyncio


def test_asyncio(known):
    model, engine = known

    async def main():
        outs = await asyncio.gather(*(scheduler.infer(identities(10 * i, 10)) for i in range(50)))
        for i, out in enumerate(outs):
            assert numbers(out.logits) == list(range(10 * i, 10 * i + 10))
        assert same(outs[0], model(identities(0, 10)))
        assert len((await scheduler.infer(identities(0, 0))).logits) == 0
        with pytest.raises(DeadlineExceeded):
            await scheduler.infer(identities(0, 1), deadline_ms=0)

    with Scheduler(engine, stage_times=TIMES, max_queue=32) as scheduler:
        asyncio.run(main())
    assert scheduler.stats()["requests"]["answered"] == 50


def test_asyncio_waits_for_room_and_can_be_cancelled(known):
    async def main():
        first = asyncio.ensure_future(scheduler.infer(identities(0, 4)))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await scheduler.infer(identities(4, 1), block=False)
        with pytest.raises(DeadlineExceeded):
            await scheduler.infer(identities(4, 1), deadline_ms=10)
        waiting = asyncio.ensure_future(scheduler.infer(identities(4, 1)))
        given_up = asyncio.ensure_future(scheduler.infer(identities(5, 1)))
        await asyncio.sleep(0.01)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        go.set()
        assert numbers((await first).logits) == [0, 1, 2, 3]
        assert numbers((await waiting).logits) == [4]
        go.clear()
        begun.clear()
        running = asyncio.ensure_future(scheduler.infer(identities(8, 2)))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        go.set()

    with stuck(known, max_queue=4) as (scheduler, go, begun):
        asyncio.run(main())
    requests = scheduler.stats()["requests"]
    assert (requests["answered"], requests["cancelled"], requests["refused"]) == (2, 1, 2)


# Counters


def test_stats_are_plain_numbers():
    core, engine = fake_core([2.0, 3.0], [0.0, 0.0], max_batch=4)
    core.add(Request(exits(0, 0, 1, 1)))
    core.add(Request(exits(0)))
    core.cancel(next(reversed(core._open)))
    core.step()
    stats = core.stats()
    assert stats["waiting"] == 2 and stats["stages"][1]["waiting"] == 2
    drain(core)
    stats = core.stats()
    assert stats["stages"] == [
        {"waiting": 0, "runs": 1, "refilled": 0, "samples": 4, "fill": 1.0,
         "busy_ms": pytest.approx(2.0)},
        {"waiting": 0, "runs": 1, "refilled": 0, "samples": 2, "fill": 0.5,
         "busy_ms": pytest.approx(3.0)},
    ]  # fmt: skip
    assert [e["samples"] for e in stats["exits"]] == [2, 2]
    assert [e["mean_ms"] for e in stats["exits"]] == [pytest.approx(2.0), pytest.approx(5.0)]
    for e, ms in zip(stats["exits"], (2.0, 5.0), strict=True):
        assert ms <= e["p50_ms"] == e["p99_ms"] <= 1.25 * ms
        assert sum(n for _, n in e["histogram"]) == 2
    assert stats["requests"] == {
        "accepted": 2, "refused": 0, "answered": 1, "failed": 0, "expired": 0, "cancelled": 1,
        "closed": 0,
    }  # fmt: skip


def test_prometheus_shows_the_stats(known):
    client = pytest.importorskip("prometheus_client")
    registry = client.CollectorRegistry(auto_describe=True)
    with (
        Scheduler(known[1], stage_times=TIMES) as one,
        Scheduler(known[1], stage_times=TIMES) as two,
    ):
        wait([one.submit(identities(0, 200))])
        for _ in range(2):
            one.register(registry, "one")
        two.register(registry)
        with pytest.raises(ValueError, match="name: expected one that no other scheduler has"):
            two_more = Scheduler(known[1], stage_times=TIMES)
            try:
                two_more.register(registry, "one")
            finally:
                two_more.shutdown()

        def value(name, **labels):
            return registry.get_sample_value(f"elf_fast_{name}", labels)

        stats = one.stats()
        assert value("requests_total", scheduler="one", outcome="answered") == 1
        assert value("requests_total", scheduler="0", outcome="answered") == 0
        for e in range(3):
            labels = {"scheduler": "one", "stage": str(e)}
            assert value("batches_total", **labels) == stats["stages"][e]["runs"] > 0
            assert value("stage_samples_total", **labels) == stats["stages"][e]["samples"]
            assert value("waiting_samples", **labels) == 0
            labels = {"scheduler": "one", "exit": str(e)}
            count = value("latency_seconds_count", **labels)
            assert count == stats["exits"][e]["samples"] > 0
            assert value("latency_seconds_bucket", le="+Inf", **labels) == count
            mean = value("latency_seconds_sum", **labels) / count
            assert mean == pytest.approx(stats["exits"][e]["mean_ms"] / 1e3)
        client.generate_latest(registry)
    one.register()
    one.register()


def test_without_prometheus_the_message_says_what_to_install(known, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "prometheus_client", None)
    wanted = pytest.raises(ModuleNotFoundError, match=r"install elf-fast\[serve\]")
    with Scheduler(known[1], stage_times=TIMES) as scheduler, wanted:
        scheduler.register()
