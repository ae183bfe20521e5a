"""`Scheduler`: a thread that answers requests from threads and from asyncio."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from .. import checks
from ..base import ELFOutput
from . import prometheus
from .core import SchedulerCore
from .request import DeadlineExceeded, OnExit, QueueFull, Request, SchedulerClosed
from .stage_times import Stages, Times

__all__ = ["Scheduler"]


class _Engine(Stages, Protocol):
    def __call__(self, x: Tensor) -> ELFOutput: ...


class _Parked(NamedTuple):
    """A request for which there is no room yet."""

    request: Request
    future: Future[ELFOutput]
    admitted: Future[None]


class Scheduler:
    """Answers requests of any size with an engine whose batches they share.

    Samples wait in one queue per stage. Those that go on after an exit join the queue of the next
    stage, where they meet samples of other requests if that pays; an answer is there at the moment
    its sample leaves. The results are those of `model.eval()(x)` within rounding.

    Args:
        engine: an `Engine`. Its thresholds may change at any time.
        max_batch: samples in a batch, at most `engine.max_batch`.
        max_wait_ms: how long samples of a batch that is not full may be held at a stage so that
            more can join them. 0: never. A stage that is running delays them further.
        max_queue: samples that may be under way at once.
        refill: False runs every batch through the stages on its own, whether or not that pays.
        stage_times: {n: milliseconds of each stage for n samples}, which decide what pays. None:
            they are measured now, which takes a few runs of each stage.
        clock: seconds, for deadlines, waiting and latency.

    Raises:
        TypeError, ValueError: naming the argument.

    Examples:
        >>> with Scheduler(engine, max_batch=64, max_wait_ms=5) as scheduler:
        ...     future = scheduler.submit(images)  # [k, 3, 224, 224]
        ...     future.result().prediction  # [k]
    """

    def __init__(
        self,
        engine: _Engine,
        *,
        max_batch: int = 64,
        max_wait_ms: float = 5.0,
        max_queue: int = 1024,
        refill: bool = True,
        stage_times: Times | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._core = SchedulerCore(
            engine, max_batch=max_batch, max_wait_ms=max_wait_ms, max_queue=max_queue,
            refill=refill, stage_times=stage_times, clock=clock,
        )  # fmt: skip
        self._lock = threading.Lock()  # of everything below and of the core
        self._work = threading.Condition(self._lock)
        self._futures: dict[Request, Future[ELFOutput]] = {}
        self._parked: deque[_Parked] = deque()
        self._left: list[tuple[OnExit, Request, list[int], ELFOutput]] = []
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="elf_fast scheduler", daemon=True)
        self._thread.start()

    def submit(
        self,
        x: Tensor,
        deadline_ms: float | None = None,
        *,
        block: bool = True,
        timeout: float | None = None,
        on_exit: OnExit | None = None,
    ) -> Future[ELFOutput]:
        """Accepts a request. `cancel()` of the future drops what has not left.

        Args:
            x: [k, ...], samples as the engine takes them; they are copied. k may be 0.
            deadline_ms: milliseconds from now after which the request ends with `DeadlineExceeded`.
            block: wait for room in the queue, behind those who wait already. False: raise
                `QueueFull` if there is none.
            timeout: seconds to wait for room at most.
            on_exit: called with (indices [m], their values as an `ELFOutput` of m samples) each
                time samples of the request leave. It runs in the scheduler's thread and must not
                block. The request fails with what it raises.

        Returns:
            The future of the k samples' values, in their order.

        Raises:
            QueueFull: no room, now or within `timeout`.
            DeadlineExceeded: the deadline passed before there was room.
            SchedulerClosed: after `shutdown`.
            TypeError, ValueError: naming the argument.
        """
        if timeout is not None:
            checks.at_least("timeout", timeout, 0)
        request, future, parked = self._accept(x, deadline_ms, block, on_exit)
        if parked is None or request is None:
            return future
        times = [timeout] if timeout is not None else []
        if request.deadline is not None:
            times.append(max(request.deadline - self._clock(), 0.0))
        try:
            parked.admitted.result(min(times, default=None))
        except FutureTimeoutError:
            if self._unpark(parked):
                raise self._no_room(request) from None
        except BaseException:
            self._unpark(parked)
            future.cancel()
            raise
        return future

    async def infer(
        self, x: Tensor, deadline_ms: float | None = None, *, block: bool = True,
        on_exit: OnExit | None = None,
    ) -> ELFOutput:  # fmt: skip
        """`submit` for asyncio: waits for room and for the answer without blocking the loop. A task
        that is cancelled cancels its request. Arguments and errors are those of `submit`."""
        request, future, parked = self._accept(x, deadline_ms, block, on_exit)
        if parked is not None and request is not None:
            left = None if request.deadline is None else request.deadline - self._clock()
            try:
                await asyncio.wait_for(asyncio.wrap_future(parked.admitted), left)
            except asyncio.TimeoutError:
                if self._unpark(parked):
                    raise self._no_room(request) from None
            except BaseException:
                self._unpark(parked)
                future.cancel()
                raise
        return await asyncio.wrap_future(future)

    def stats(self) -> dict[str, Any]:
        """Plain numbers since the beginning; see `SchedulerCore.stats`."""
        with self._lock:
            return self._core.stats()

    def register(self, registry: Any = None, name: str | None = None) -> None:
        """Shows `stats` in a registry of `prometheus_client` (extra `serve`), as long as this
        object lives. Several schedulers may share a registry; registering again does nothing.

        Args:
            registry: a `CollectorRegistry`; None: the default one.
            name: label `scheduler` of the metrics; None: a number.

        Raises:
            ModuleNotFoundError: prometheus_client is not installed.
            ValueError: another scheduler has this name in this registry.
        """
        prometheus.register(self, registry, name)

    def shutdown(self, wait: bool = True) -> None:
        """Takes no more requests. Requests that wait for room in the queue get `SchedulerClosed`.
        The end of a `with` block calls it with wait=True, or after an error with wait=False.

        Args:
            wait: True answers what was accepted and returns then. False ends every request that is
                not answered with `SchedulerClosed`; only the batch that is running is waited for.
        """
        error = SchedulerClosed("scheduler: shut down before it answered this request")
        with self._lock:
            self._closed = True
            parked, self._parked = self._parked, deque()
            self._core.close(None if wait else error)
            self._work.notify_all()
        for entry in parked:
            entry.admitted.set_exception(SchedulerClosed("scheduler: was shut down"))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, kind: type[BaseException] | None, *args: object) -> None:
        self.shutdown(wait=kind is None)

    def _accept(
        self, x: Tensor, deadline_ms: float | None, block: bool, on_exit: OnExit | None
    ) -> tuple[Request | None, Future[ELFOutput], _Parked | None]:
        """Adds a request, or parks it where there is no room."""
        now = self._clock()
        if deadline_ms is not None:
            checks.at_least("deadline_ms", deadline_ms, 0)
        future: Future[ELFOutput] = Future()
        if isinstance(x, Tensor) and x.dim() and not len(x):
            future.set_result(self._engine(x))
            return None, future, None
        deadline = None if deadline_ms is None else now + deadline_ms / 1e3
        request = Request(x, deadline=deadline, arrived=now)
        if on_exit is not None:
            request.on_exit = lambda indices, values: self._left.append(
                (on_exit, request, indices, values)
            )
        self._core.check(request)
        with self._lock:
            if self._closed:
                raise SchedulerClosed("scheduler: expected an open one, got one that was shut down")
            if block and (self._parked or not self._core.has_room(request.size)):
                parked = _Parked(request, future, Future())
                self._parked.append(parked)
                return request, future, parked
            if self._parked:
                self._core.counters.refused += 1
                raise QueueFull(
                    f"x: expected no request that waits for room, got {len(self._parked)}"
                )
            self._add(request, future)
            self._work.notify_all()
        return request, future, None

    def _add(self, request: Request, future: Future[ELFOutput]) -> None:
        self._core.add(request)
        self._futures[request] = future
        future.add_done_callback(lambda f: self._cancel(request) if f.cancelled() else None)

    def _cancel(self, request: Request) -> None:
        with self._lock:
            if self._core.cancel(request):
                self._work.notify_all()

    def _admit(self) -> None:
        """Adds parked requests, in their order, as long as there is room."""
        while self._parked and self._core.has_room(self._parked[0].request.size):
            parked = self._parked.popleft()
            if parked.admitted.set_running_or_notify_cancel():
                self._add(parked.request, parked.future)
                parked.admitted.set_result(None)

    def _unpark(self, parked: _Parked) -> bool:
        """Gives up waiting for room. False: the request was added meanwhile."""
        with self._lock:
            with suppress(ValueError):
                self._parked.remove(parked)
            return parked.request.x is not None

    def _no_room(self, request: Request) -> Exception:
        """The error for a request that waited for room in vain."""
        with self._lock:
            self._core.counters.refused += 1
        if request.deadline is not None and request.deadline <= self._clock():
            return DeadlineExceeded("deadline: passed before there was room in the queue")
        return QueueFull(
            f"x: expected room for {request.size} samples (max_queue = {self._core.max_queue}), "
            "got none within timeout"
        )

    def _serve(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:  # answers every caller, whatever happened here
            with self._lock:
                self._closed = True
                parked, self._parked = self._parked, deque()
                self._core.close(error)
            for entry in parked:
                entry.admitted.set_exception(error)
            self._deliver()
            raise

    def _turn(self) -> bool:
        """One batch, or one wait. False: closed, and nothing is left to do."""
        with self._lock:
            self._admit()
            batch = self._core.begin()
            if batch is None and not self._core.has_finished():
                if self._closed and not self._core.waiting:
                    return False
                seconds = self._core.wake - self._clock()
                self._work.wait(None if math.isinf(seconds) else max(seconds, 0.0))
                return True
        if batch is not None:
            self._core.run(batch)
            with self._lock:
                self._core.end(batch)
        self._deliver()
        return True

    def _deliver(self) -> None:
        """Tells callers what has left and what has ended. Their callbacks run without the lock."""
        with self._lock:
            left, self._left = self._left, []
            ended = [(r, self._futures.pop(r)) for r in self._core.take_finished()]
        errors: dict[Request, BaseException] = {}
        for on_exit, request, indices, values in left:
            if request not in errors:
                try:
                    on_exit(indices, values)
                except Exception as raised:
                    errors[request] = raised
        with self._lock:
            for request, raised_there in errors.items():
                self._core.fail(request, raised_there)
            ended += [(r, self._futures.pop(r)) for r in self._core.take_finished()]
        for request, future in ended:
            error = errors.get(request, request.error)
            if future.set_running_or_notify_cancel():
                if error is not None:
                    future.set_exception(error)
                else:
                    future.set_result(request.output())
