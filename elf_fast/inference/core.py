"""`SchedulerCore`: requests of any size share batches, stage by stage. No threads in here."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor

from .. import checks, ops
from .counters import Counters
from .queues import Slot, StageQueue
from .refill import Refill
from .request import DeadlineExceeded, QueueFull, Request
from .stage_times import Stages, Times, scheduler_times

__all__ = ["Batch", "SchedulerCore"]


class Batch:
    """Samples that one stage runs, and what came of it."""

    def __init__(self, stage: int, x: Tensor, slots: list[Slot]) -> None:
        self.stage = stage
        self.x = x  # [n, ...]
        self.slots = slots  # of the n samples
        self.result: Any = None  # a `StageResult`
        self.error: Exception | None = None
        self.seconds = 0.0


class SchedulerCore:
    """A queue per stage, and the rule which of them runs next. `Scheduler` documents the arguments.

    A loop that owns an instance calls `add` for what arrives and `step` for the work; `wake` says
    when an idle one must be called again. Not safe to call from several threads at once, except
    that `run` may go on while the other methods are called.

    Examples:
        >>> core = SchedulerCore(engine)
        >>> core.add(Request(images))
        >>> while core.waiting:
        ...     for request in core.step():
        ...         print(request.outcome, request.output().prediction)
    """

    def __init__(
        self,
        engine: Stages,
        *,
        max_batch: int = 64,
        max_wait_ms: float = 5.0,
        max_queue: int = 1024,
        refill: bool = True,
        stage_times: Times | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        checks.integer("max_batch", max_batch, 1, engine.max_batch)
        checks.at_least("max_wait_ms", max_wait_ms, 0)
        checks.integer("max_queue", max_queue, 1)
        self.max_queue = max_queue
        self.counters = Counters(engine.stages, max_batch)
        #: Samples that were accepted and have neither left nor ended otherwise.
        self.waiting = 0
        #: When `step` has something to do, in seconds on the clock, if it found nothing to do.
        self.wake = float("inf")
        self._engine = engine
        self._max_batch = max_batch
        self._clock = clock
        self._closing = False
        self._refill = Refill(
            scheduler_times(stage_times, engine, max_batch), max_batch, max_wait_ms / 1e3,
            refill=refill,
        )  # fmt: skip
        self._queues = [
            StageQueue(lambda n, e=e: engine.stage_input(e, n), 2 * max_batch)  # type: ignore[misc]
            for e in range(engine.stages)
        ]
        self._like = engine.stage_input(0, 1)
        self._open: dict[Request, None] = {}  # in the order in which they came
        self._deadlines: list[tuple[float, int, Request]] = []  # a heap
        self._number = count()
        self._finished: list[Request] = []

    def has_room(self, n: int = 1) -> bool:
        """Whether n samples more may be added."""
        return self.waiting + n <= self.max_queue

    def check(self, request: Request) -> None:
        """Raises TypeError or ValueError if `add` would never take this request."""
        x, like = request.x, self._like
        if x is None:
            raise ValueError("request: expected a new one, got one that was added before")
        if x.dtype != like.dtype or x.shape[1:] != like.shape[1:]:
            raise ValueError(
                f"x: expected a {str(like.dtype).removeprefix('torch.')} tensor of shape "
                f"[k, {', '.join(map(str, like.shape[1:]))}], got {checks.describe(x)}"
            )
        checks.same_device("x", x, like.device)
        if request.size > self.max_queue:
            raise ValueError(
                f"x: expected at most max_queue = {self.max_queue} samples, got {request.size}"
            )

    def add(self, request: Request) -> None:
        """Puts the samples of a request, which are copied, into the first queue.

        Raises:
            QueueFull: there is no room for all of them.
            TypeError, ValueError: naming the argument.
        """
        self.check(request)
        if not self.has_room(request.size):
            self.counters.refused += 1
            raise QueueFull(
                f"x: expected at most {self.max_queue - self.waiting} samples, for which there is "
                f"room now (max_queue = {self.max_queue}), got {request.size}"
            )
        now = self._clock()
        if request.arrived is None:
            request.arrived = now
        assert request.x is not None
        self._enqueue(0, request.x, None, [Slot(request, i, now) for i in range(request.size)])
        request.x = None
        self.waiting += request.size
        self.counters.accepted += 1
        self._refill.arrived(request.arrived, request.size)
        self._open[request] = None
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, next(self._number), request))

    def step(self) -> list[Request]:
        """Runs at most one batch. Returns the requests that have ended since the last call."""
        batch = self.begin()
        if batch is not None:
            self.run(batch)
            self.end(batch)
        return self.take_finished()

    def begin(self) -> Batch | None:
        """Ends requests whose deadline has passed, and takes the next batch from its queue. None:
        there is nothing to run before `wake`. `run` and `end` follow before the next `begin`."""
        now = self._clock()
        self._expire(now)
        choice = self._refill.choose(self._queues, now, closing=self._closing)
        if choice.stage is None:
            self.wake = min(choice.wake, self._deadlines[0][0] if self._deadlines else choice.wake)
            return None
        e = choice.stage
        queue = self._queues[e]
        return Batch(e, *queue.take(min(len(queue), self._max_batch)))

    def run(self, batch: Batch) -> None:
        """Runs the stage. An error is kept for `end`."""
        start = self._clock()
        try:
            batch.result = self._engine.run_stage(batch.stage, batch.x)
        except Exception as error:
            batch.error = error
        batch.seconds = self._clock() - start

    def end(self, batch: Batch) -> None:
        """Hands results to their requests and survivors to the next queue."""
        e, slots = batch.stage, batch.slots
        self._queues[e].release()
        refilled = slots[0].entered != slots[-1].entered
        self.counters.ran(e, len(slots), batch.seconds, refilled=refilled)
        now = self._clock()
        self._expire(now)
        error = batch.error
        if error is None:
            try:
                self._distribute(batch, now)
            except Exception as found:
                error = found
        if error is not None:
            for request in {slot.request: None for slot in slots}:
                self._finish(request, "failed", error)

    def cancel(self, request: Request) -> bool:
        """Drops the samples of a request that is under way. False: it has ended already."""
        return self._finish(request, "cancelled", None)

    def fail(self, request: Request, error: BaseException) -> bool:
        """Ends a request with an error. False: it has ended already."""
        return self._finish(request, "failed", error)

    def expire(self, request: Request) -> bool:
        """Ends a request as if its deadline had passed. False: it has ended already."""
        error = DeadlineExceeded(
            f"deadline: {len(request.left)} of {request.size} samples had left when it passed"
        )
        return self._finish(request, "expired", error)

    def close(self, error: BaseException | None = None) -> None:
        """From now on no batch waits for a request to come. error: ends all requests with it."""
        self._closing = True
        for request in list(self._open) if error is not None else ():
            self._finish(request, "closed", error)

    def has_finished(self) -> bool:
        """Whether `take_finished` would return a request."""
        return bool(self._finished)

    def take_finished(self) -> list[Request]:
        """The requests that have ended since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def stats(self) -> dict[str, Any]:
        """Plain numbers since the beginning.

        "requests": accepted, refused, and how they ended: answered, failed, expired, cancelled,
        closed. "stages", for each stage: samples waiting, runs, refilled (runs with samples that
        came to the stage at several times), samples, fill (mean share of `max_batch`), busy_ms.
        "exits", for each exit: samples that left there, and their latency: mean_ms, p50_ms, p99_ms
        (the quantiles to within a quarter) and a histogram [(upper bound in ms, samples)].
        "waiting": samples that have not left.
        """
        return {"waiting": self.waiting, **self.counters.as_dict(list(map(len, self._queues)))}

    def _enqueue(self, e: int, x: Tensor, rows: Tensor | None, slots: Sequence[Slot]) -> None:
        """Copies rows of x (None: all) into the memory of queue e."""
        queue = self._queues[e]
        first = 0
        with torch.inference_mode():
            for memory in queue.room(len(slots)):
                last = first + len(memory)
                if rows is None:
                    memory.copy_(x[first:last])
                else:
                    ops.compact_into(memory, x, rows[first:last], None)
                first = last
        queue.push(slots)

    def _distribute(self, batch: Batch, now: float) -> None:
        e, slots, result = batch.stage, batch.slots, batch.result
        survivors = result.survivors.tolist()
        self._refill.left(e, len(slots), len(survivors))
        onwards = [row for row in survivors if not slots[row].request.done]
        if onwards:
            rows = result.survivors
            if len(onwards) < len(survivors):
                rows = torch.tensor(onwards, device=rows.device)
            moved = [slots[row]._replace(entered=now) for row in onwards]
            self._enqueue(e + 1, result.features, rows, moved)
        going = set(survivors)
        by_request: dict[Request, list[int]] = {}
        for row, slot in enumerate(slots):
            if row not in going and not slot.request.done:
                by_request.setdefault(slot.request, []).append(row)
        if not by_request:
            return
        prediction, confidence = result.prediction.tolist(), result.confidence.tolist()
        for request, leavers in by_request.items():
            indices = [slots[row].sample for row in leavers]
            logits = result.logits[leavers[0] : leavers[-1] + 1]
            if len(logits) != len(leavers):
                logits = result.logits[torch.tensor(leavers, device=logits.device)]
            request.record(indices, logits, [(prediction[r], confidence[r], e) for r in leavers])
            self.waiting -= len(leavers)
            assert request.arrived is not None
            self.counters.latency[e].add(1e3 * (now - request.arrived), len(leavers))
            self._tell(request, indices)

    def _tell(self, request: Request, indices: list[int]) -> None:
        if request.on_exit is not None:
            try:
                request.on_exit(indices, request.output(indices))
            except Exception as error:
                self._finish(request, "failed", error)
        if len(request.left) == request.size:
            self._finish(request, "answered", None)

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            self.expire(heapq.heappop(self._deadlines)[2])

    def _finish(self, request: Request, outcome: str, error: BaseException | None) -> bool:
        if request not in self._open:
            return False
        del self._open[request]
        request.outcome, request.error = outcome, error
        self.counters.outcomes[outcome] += 1
        self._finished.append(request)
        if outcome != "answered":
            self.waiting -= request.size - len(request.left)
            for queue in self._queues:
                queue.drop(request)
        if len(self._deadlines) > 2 * len(self._open) + 64:
            self._deadlines = [item for item in self._deadlines if not item[2].done]
            heapq.heapify(self._deadlines)
        return True
