"""Simulates replicas of the scheduler behind a router, from measured times of the stages.

    python -m benchmarks.serving_simulation [--times FILE] [--replicas 1 2 4] [--loads 0.5 0.8 0.95]

Requests of 1 to 16 images arrive at random (Poisson). A load of 1 is what the replicas can do with
full batches at every stage. FILE holds {"milliseconds": {n: [E]}, "exit_shares": [E]}; without it
the stages of ResNet-32 are measured now, and `--write FILE` keeps the times.

The simulator knows nothing of tensors and threads. It shares the rule which batch runs next
(`elf_fast.inference.refill`) with the scheduler. `run_scheduler` runs the scheduler itself on a
clock that its stages move, for comparison.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple

import torch
from torch import Tensor

from elf_fast.inference import Request, SchedulerCore
from elf_fast.inference.engine import StageResult
from elf_fast.inference.refill import Refill
from elf_fast.inference.stage_times import interpolated

ROUTERS = ("round robin", "least loaded")


class Workload(NamedTuple):
    """Requests in the order in which they come."""

    arrivals: list[float]  # seconds
    exits: list[list[int]]  # at which the images of each request leave


class Settings(NamedTuple):
    """See `elf_fast.inference.Scheduler`."""

    max_batch: int = 64
    max_wait_ms: float = 5.0
    refill: bool = True


DEFAULT = Settings()


class Result(NamedTuple):
    images_per_s: float
    p50_ms: float  # from a request's arrival to its last image's exit, likewise p99_ms
    p99_ms: float
    fill: float  # mean share of max_batch of all batches

    @classmethod
    def of(cls, workload: Workload, ended: Sequence[float], fill: float) -> Result:
        """ended: seconds at which each request was answered."""
        latency = [1e3 * (b - a) for a, b in zip(workload.arrivals, ended, strict=True)]
        cuts = quantiles(latency, n=100, method="inclusive")
        images = sum(map(len, workload.exits))
        return cls(images / (max(ended) - workload.arrivals[0]), cuts[49], cuts[98], fill)


def capacity(seconds: Sequence[Sequence[float]], shares: Sequence[float], max_batch: int) -> float:
    """Images per second of one replica whose batches are full at every stage. shares: [E], of the
    images that leave at each exit."""
    reach, per_image = 1.0, 0.0
    for stage, share in zip(seconds, shares, strict=True):
        per_image += reach * stage[max_batch] / max_batch
        reach -= share
    return 1 / per_image


def poisson(images_per_s: float, requests: int, shares: Sequence[float], seed: int) -> Workload:
    """Requests of 1 to 16 images that come independently of each other."""
    rng = random.Random(seed)
    now, arrivals, exits = 0.0, [], []
    for _ in range(requests):
        now += rng.expovariate(images_per_s / 8.5)
        arrivals.append(now)
        exits.append(rng.choices(range(len(shares)), shares, k=rng.randint(1, 16)))
    return Workload(arrivals, exits)


class _Image(NamedTuple):
    request: int
    exit: int
    entered: float


class _Queue(deque[_Image]):
    """What the rule asks of images that wait for a stage."""

    @property
    def oldest(self) -> float:
        return self[0].entered

    def earliest_deadline(self) -> float:
        return math.inf


class _Replica:
    def __init__(self, seconds: Sequence[Sequence[float]], settings: Settings) -> None:
        self.seconds, self.max_batch = seconds, settings.max_batch
        self.queues = [_Queue() for _ in seconds]
        self.refill = Refill(
            seconds, settings.max_batch, settings.max_wait_ms / 1e3, refill=settings.refill
        )
        self.running: tuple[int, list[_Image]] | None = None
        self.images = 0  # under way
        self.sizes: list[int] = []  # of the batches

    def add(self, request: int, exits: Sequence[int], now: float) -> None:
        self.queues[0].extend(_Image(request, e, now) for e in exits)
        self.images += len(exits)
        self.refill.arrived(now, len(exits))

    def start(self, now: float) -> float:
        """Starts a batch if the rule says so. Returns when to come back."""
        stage, wake = self.refill.choose(self.queues, now)
        if stage is None:
            return wake
        queue = self.queues[stage]
        batch = [queue.popleft() for _ in range(min(len(queue), self.max_batch))]
        self.running = stage, batch
        self.sizes.append(len(batch))
        return now + self.seconds[stage][len(batch)]

    def finish(self, now: float) -> list[int]:
        """Ends the batch. Returns the requests of the images that left."""
        assert self.running is not None
        (stage, batch), self.running = self.running, None
        onwards = [image._replace(entered=now) for image in batch if image.exit > stage]
        self.refill.left(stage, len(batch), len(onwards))
        if onwards:
            self.queues[stage + 1].extend(onwards)
        self.images -= len(batch) - len(onwards)
        return [image.request for image in batch if image.exit <= stage]


def simulate(
    workload: Workload,
    seconds: Sequence[Sequence[float]],
    settings: Settings = DEFAULT,
    *,
    replicas: int = 1,
    router: str = "round robin",
) -> Result:
    """Runs a workload on replicas. seconds[e][n]: time of stage e for n <= max_batch images."""
    fleet = [_Replica(seconds, settings) for _ in range(replicas)]
    missing = [len(exits) for exits in workload.exits]
    ended = [0.0] * len(missing)
    number = count()
    # (time, order, replica or None for an arrival, whether a batch ends)
    events = [(at, next(number), None, False) for at in workload.arrivals]
    heapq.heapify(events)
    arrived = 0
    while events:
        now, _, replica, ends = heapq.heappop(events)
        if replica is None:
            chosen = fleet[arrived % replicas]
            if router == "least loaded":
                chosen = min(fleet, key=lambda r: r.images)
            chosen.add(arrived, workload.exits[arrived], now)
            arrived += 1
        else:
            chosen = fleet[replica]
            if ends:
                for request in chosen.finish(now):
                    missing[request] -= 1
                    ended[request] = now
        if chosen.running is None:
            back = chosen.start(now)
            if not math.isinf(back):
                at = fleet.index(chosen)
                heapq.heappush(events, (back, next(number), at, chosen.running is not None))
    assert not any(missing)
    sizes = [n for one in fleet for n in one.sizes]
    return Result.of(workload, ended, sum(sizes) / len(sizes) / settings.max_batch)


class Clock:
    """Seconds that pass when something says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class TimedEngine:
    """Stages that take given times on a clock. An image [1] holds the exit at which it leaves."""

    def __init__(self, clock: Clock, seconds: Sequence[Sequence[float]]) -> None:
        """seconds[e][n]: of stage e for n images."""
        self.clock, self.seconds = clock, seconds
        self.stages, self.max_batch = len(seconds), len(seconds[0]) - 1
        self.runs: list[tuple[int, int]] = []  # stage and batch size

    def stage_input(self, e: int, n: int) -> Tensor:
        return torch.empty(n, 1)

    def run_stage(self, e: int, x: Tensor) -> StageResult:
        self.runs.append((e, len(x)))
        self.clock.now += self.seconds[e][len(x)]
        survivors = (x[:, 0] > e).nonzero().flatten()
        features = None if e == self.stages - 1 else x
        return StageResult(features, x.clone(), x[:, 0].long(), x[:, 0].clone(), survivors)


def run_scheduler(
    workload: Workload, milliseconds: Mapping[int, Sequence[float]], settings: Settings = DEFAULT
) -> Result:
    """`simulate` for one replica, with the scheduler itself."""
    clock = Clock()
    engine = TimedEngine(clock, interpolated(milliseconds, settings.max_batch))
    core = SchedulerCore(
        engine, max_queue=sum(map(len, workload.exits)), stage_times=milliseconds, clock=clock,
        **settings._asdict(),
    )  # fmt: skip
    ended: dict[Request, float] = {}
    requests: list[Request] = []

    def add_what_came() -> None:
        now = clock.now
        while len(requests) < len(workload.exits) and workload.arrivals[len(requests)] <= now:
            clock.now = workload.arrivals[len(requests)]
            exits = torch.tensor(workload.exits[len(requests)], dtype=torch.float32)
            requests.append(Request(exits[:, None]))
            core.add(requests[-1])
        clock.now = now

    while len(ended) < len(workload.exits):
        add_what_came()
        batch = core.begin()
        if batch is None:
            coming = workload.arrivals[len(requests) : len(requests) + 1]
            clock.now = min([core.wake, *coming])
            continue
        core.run(batch)
        add_what_came()
        core.end(batch)
        ended |= dict.fromkeys(core.take_finished(), clock.now)
    sizes = [n for _, n in engine.runs]
    fill = sum(sizes) / len(sizes) / settings.max_batch
    return Result.of(workload, [ended[request] for request in requests], fill)


def compare(
    workload: Workload, milliseconds: Mapping[int, Sequence[float]], settings: Settings = DEFAULT
) -> tuple[Result, Result]:
    """One replica: what the simulator says, and what the scheduler does."""
    seconds = interpolated(milliseconds, settings.max_batch)
    return simulate(workload, seconds, settings), run_scheduler(workload, milliseconds, settings)


def measured(max_batch: int) -> tuple[dict[int, list[float]], list[float]]:
    """Milliseconds of the stages of ResNet-32, of whose images half go on after each exit, and the
    share of images that leave at each exit."""
    from elf_fast.bench.workload import inference_work
    from elf_fast.inference import compile
    from elf_fast.inference.stage_times import measure_stages

    from .inputs import SMALL, build

    work = inference_work(*build(SMALL, 256), 0.5)
    engine = compile(work.model, work.images, engine="eager", max_batch=max_batch)
    shares = work.exit_index.bincount(minlength=engine.stages) / len(work.images)
    return measure_stages(engine, max_batch), shares.tolist()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving_simulation", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--times", type=Path, metavar="FILE")
    parser.add_argument("--write", type=Path, metavar="FILE", help="keep the measured times")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.8, 0.95])
    parser.add_argument("--max-batch", type=int, default=64)
    parser.add_argument("--max-wait-ms", type=float, default=5.0)
    parser.add_argument("--requests", type=int, default=5000)
    options = parser.parse_args()
    if options.times is not None:
        found = json.loads(options.times.read_text())
        milliseconds = {int(n): row for n, row in found["milliseconds"].items()}
        shares = found["exit_shares"]
    else:
        milliseconds, shares = measured(options.max_batch)
    if options.write is not None:
        found = {"milliseconds": milliseconds, "exit_shares": shares}
        options.write.write_text(json.dumps(found, indent=1) + "\n")
    show(milliseconds, shares, options)


def show(
    milliseconds: Mapping[int, Sequence[float]],
    shares: Sequence[float],
    options: argparse.Namespace,
    write: Callable[[str], None] = print,
) -> None:
    """A line for every number of replicas, load, router, and with and without refilling."""
    seconds = interpolated(milliseconds, options.max_batch)
    most = capacity(seconds, shares, options.max_batch)
    write(f"one replica with full batches: {most:.0f} images/s")
    write("replicas  load  router        refill  images/s   p50 ms   p99 ms  fill")
    for replicas in options.replicas:
        for load in options.loads:
            workload = poisson(load * most * replicas, options.requests, shares, seed=0)
            for router in ROUTERS if replicas > 1 else ROUTERS[:1]:
                for refill in (True, False):
                    settings = Settings(options.max_batch, options.max_wait_ms, refill)
                    r = simulate(workload, seconds, settings, replicas=replicas, router=router)
                    write(
                        f"{replicas:8} {load:5.2f}  {router:12}  {'yes' if refill else 'no':6} "
                        f"{r.images_per_s:9.0f} {r.p50_ms:8.3g} {r.p99_ms:8.3g} {r.fill:5.2f}"
                    )


if __name__ == "__main__":
    main()
