"""A server's throughput and latency: requests of 1 to 16 images that come at random (Poisson).

Half of the images go on after each exit. Candidates, all on the same engine code: the scheduler;
one request at a time; and a plain dynamic batcher, which collects whole requests for the network
without exits. Latency counts from the moment at which a request was due, so that a driver that is
late hides nothing. A load is a share of what the scheduler does at saturation, for all candidates:
the others may be overloaded, and their latency then grows with the length of the run.
"""

from __future__ import annotations

import copy
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from statistics import median, quantiles
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from elf_fast import criteria
from elf_fast.bench.workload import InferenceWork, inference_work
from elf_fast.inference import Engine, Scheduler, compile
from elf_fast.inference.stage_times import interpolated, measure_stages
from elf_fast.timing import Quartiles

from .. import serving_simulation as simulation
from ..inputs import MIDDLE, SMALL, Network, build
from ..row import Row, quartiles_of_ratio

MAX_BATCH = 64
MAX_WAIT_MS = 20.0
LOADS = (0.5, 0.8, 0.95)
SHARE = 0.5
NAMES = ("scheduler", "one request at a time", "dynamic batcher")


class Server(Protocol):
    def submit(self, x: Tensor) -> Future[Any]: ...

    def shutdown(self) -> None: ...


class Requests(NamedTuple):
    images: list[Tensor]  # [k, ...] of each
    due: list[float]  # seconds after the beginning

    @property
    def total(self) -> int:
        return sum(map(len, self.images))


class OneAtATime:
    """A thread that answers requests in their order, each on its own."""

    def __init__(self, engine: Callable[[Tensor], Any]) -> None:
        self.engine = engine
        self.queue: queue.SimpleQueue[tuple[Tensor, Future[Any]] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def submit(self, x: Tensor) -> Future[Any]:
        future: Future[Any] = Future()
        self.queue.put((x, future))
        return future

    def shutdown(self) -> None:
        self.queue.put(None)
        self.thread.join()

    def serve(self) -> None:
        while (item := self.queue.get()) is not None:
            item[1].set_result(self.engine(item[0]))


class DynamicBatcher(OneAtATime):
    """Whole requests together, up to MAX_BATCH images, and MAX_WAIT_MS after the first at most."""

    def serve(self) -> None:
        kept: tuple[Tensor, Future[Any]] | None = None
        while True:
            first = kept if kept is not None else self.queue.get()
            kept = None
            if first is None:
                return
            batch, closing = [first], False
            images, until = len(first[0]), time.perf_counter() + MAX_WAIT_MS / 1e3
            while images < MAX_BATCH:
                try:
                    item = self.queue.get(timeout=max(until - time.perf_counter(), 0.0))
                except queue.Empty:
                    break
                if item is None:
                    closing = True
                    break
                if images + len(item[0]) > MAX_BATCH:
                    kept = item
                    break
                batch.append(item)
                images += len(item[0])
            out = self.engine(torch.cat([x for x, _ in batch]))
            at = 0
            for x, future in batch:
                future.set_result([value[at : at + len(x)] for value in out[:4]])
                at += len(x)
            if closing:
                return


class Case:
    """A network, and its candidates."""

    def __init__(self, network: Network, *, engine: str, seconds: float) -> None:
        self.name, self.seconds = str(network), seconds
        self.work = inference_work(*build(network, 256), SHARE)
        self.engine = self._compiled(self.work, engine)
        off = copy.deepcopy(self.work.model)
        off.thresholds = criteria.find(off.criterion).off
        self.whole = self._compiled(self.work._replace(model=off), engine)
        self.milliseconds = measure_stages(self.engine, MAX_BATCH)
        shares = self.work.exit_index.bincount(minlength=self.engine.stages)
        self.exit_shares = (shares / len(self.work.images)).tolist()

    @staticmethod
    def _compiled(work: InferenceWork, engine: str) -> Engine:
        return compile(work.model, work.images[:8], engine=engine, max_batch=MAX_BATCH)

    def server(self, name: str) -> Server:
        if name == "scheduler":
            return Scheduler(
                self.engine, max_batch=MAX_BATCH, max_wait_ms=MAX_WAIT_MS,
                stage_times=self.milliseconds, max_queue=2**20,
            )  # fmt: skip
        return OneAtATime(self.engine) if name == NAMES[1] else DynamicBatcher(self.whole)

    def requests(self, images_per_s: float | None, seed: int) -> Requests:
        """What comes within `seconds`. None: as much as the scheduler can do, all at once."""
        rng = random.Random(seed)
        seconds = interpolated(self.milliseconds, MAX_BATCH)
        rate = images_per_s or simulation.capacity(seconds, self.exit_shares, MAX_BATCH)
        images, due, now = list[Tensor](), list[float](), 0.0
        while now <= self.seconds:
            k = rng.randint(1, 16)
            first = rng.randrange(len(self.work.images) - k)
            images.append(self.work.images[first : first + k])
            due.append(0.0 if images_per_s is None else now)
            now += rng.expovariate(rate / 8.5)
        return Requests(images, due)


class Served(NamedTuple):
    us_per_image: float
    latency_us: list[float]  # of each request
    by_exit_us: list[float]  # mean of the images of each exit; empty for other servers

    @property
    def p99(self) -> float:
        return quantiles(self.latency_us, n=100, method="inclusive")[98]


def serve(server: Server, requests: Requests) -> Served:
    """Submits every request when it is due, and waits for the answers."""
    ended = [0.0] * len(requests.due)
    futures = []
    begin = time.perf_counter()
    for i, (x, due) in enumerate(zip(requests.images, requests.due, strict=True)):
        early = begin + due - time.perf_counter()
        if early > 0:
            time.sleep(early)
        futures.append(server.submit(x))
        futures[-1].add_done_callback(lambda _, i=i: ended.__setitem__(i, time.perf_counter()))
    for future in futures:
        future.result()
    server.shutdown()
    by_exit = []
    if isinstance(server, Scheduler):
        by_exit = [1e3 * e["mean_ms"] for e in server.stats()["exits"]]
    latency = [1e6 * (b - begin - a) for a, b in zip(requests.due, ended, strict=True)]
    return Served(1e6 * (max(ended) - begin) / requests.total, latency, by_exit)


def check(case: Case) -> None:
    """Raises AssertionError unless all servers give the answers of their engine to 20 requests."""
    requests = case.requests(None, 0).images[:20]
    for name in NAMES:
        engine = case.whole if name == "dynamic batcher" else case.engine
        server = case.server(name)
        found = [server.submit(x) for x in requests]
        for x, future in zip(requests, found, strict=True):
            for ours, theirs in zip(future.result()[:4], engine(x)[:4], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        server.shutdown()


def bound_us(case: Case) -> float:
    """What the p99 of the scheduler is held to up to a load of 0.8: a wait at every stage, and four
    times a full batch at all of them."""
    through = sum(case.milliseconds[MAX_BATCH])
    return 1e3 * (case.engine.stages * MAX_WAIT_MS + 4 * through)


def rows(*, full: bool) -> Iterator[Row]:
    for network in (SMALL, MIDDLE) if full else (SMALL,):
        case = Case(network, engine="auto" if full else "eager", seconds=3.0 if full else 1.0)
        yield from of_case(case, repetitions=5 if full else 3)


def of_case(case: Case, *, repetitions: int) -> Iterator[Row]:
    check(case)
    found = _measured(case, None, repetitions)
    own = [one.us_per_image for one in found["scheduler"]]
    shape = f"{case.name}, saturation"
    for name, least in (("one request at a time", 1.5), ("dynamic batcher", 1.2)):
        yield _row(
            name, f"{shape}, us per image", [s.us_per_image for s in found[name]], own, least
        )
    yield _row("simulation", f"{shape}, us per image", [_simulated(case)] * repetitions, own, None)
    for load in LOADS:
        found = _measured(case, load * 1e6 / median(own), repetitions)
        shape = f"{case.name}, load {load:g}"
        ours = found["scheduler"]
        for name in NAMES[1:]:
            theirs = found[name]
            yield _row(name, f"{shape}, median latency", _medians(theirs), _medians(ours), None)
            yield _row(name, f"{shape}, p99 latency", [s.p99 for s in theirs],
                       [s.p99 for s in ours], None)  # fmt: skip
            for e in range(case.engine.stages):
                yield _row(name, f"{shape}, mean latency at exit {e}",
                           [sum(s.latency_us) / len(s.latency_us) for s in theirs],
                           [s.by_exit_us[e] for s in ours], None)  # fmt: skip
        bound = bound_us(case)
        yield _row(f"{bound / 1e3:.3g} ms allowed", f"{shape}, p99 latency",
                   [bound] * repetitions, [s.p99 for s in ours],
                   1.0 if load <= 0.8 else None)  # fmt: skip


def _measured(case: Case, images_per_s: float | None, repetitions: int) -> dict[str, list[Served]]:
    """Candidates take turns, with the same requests in a turn."""
    found: dict[str, list[Served]] = {name: [] for name in NAMES}
    for turn in range(repetitions):
        requests = case.requests(images_per_s, turn + 1)
        for name in NAMES:
            found[name].append(serve(case.server(name), requests))
    return found


def _simulated(case: Case) -> float:
    """Microseconds per image at saturation, by the simulator."""
    seconds = interpolated(case.milliseconds, MAX_BATCH)
    workload = simulation.poisson(1e9, 500, case.exit_shares, 0)
    settings = simulation.Settings(MAX_BATCH, MAX_WAIT_MS)
    return 1e6 / simulation.simulate(workload, seconds, settings).images_per_s


def _medians(served: Sequence[Served]) -> list[float]:
    return [median(one.latency_us) for one in served]


def _row(
    baseline: str, shape: str, theirs: Sequence[float], ours: Sequence[float], least: float | None
) -> Row:
    row = Row(
        "serving", "scheduler", baseline, shape, quartiles_of_ratio(theirs, ours), least,
        {"subject": Quartiles.of(ours), "baseline": Quartiles.of(theirs)},
    )  # fmt: skip
    print(row.line(), flush=True)
    return row
