"""Timing on a GPU, side by side.

A candidate is captured into a CUDA graph of many calls that rotate over sets of buffers, together
2.5 times as large as the L2 cache where they can be; rounds replay every candidate's graph in turn,
with three ceilings: a large device-to-device copy, a read-only pass and empty kernels. So whatever
the device does between rounds falls on all of them. Medians and quartiles over the rounds, a call.
What waits for the device cannot be captured; it is called in a loop, last in every round.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Any

import torch
import triton
from interleave import Timing

import elf_fast

#: Calls in a graph, at most, and the bytes that a graph of long ones moves at least.
CALLS = 160
BYTES = 1.2e9
#: Calls of a candidate that waits, in a round.
WAITING_CALLS = 10
CEILINGS = ("copy", "read", "empty launch")


class DeviceLost(RuntimeError):
    """The device answers no more, or captures nothing: only a new process can go on. `errors`:
    what happened to the candidates so far."""

    def __init__(self, errors: dict[str, str]) -> None:
        super().__init__("the device is lost")
        self.errors = errors


@dataclass
class Candidate:
    op: str
    name: str
    call: Callable[[int], Any]  # on the i-th set of buffers
    check: Callable[[Callable[[int], Any]], None]  # calls it and raises AssertionError
    bytes: int  # least work of a call
    backend: str | None = None  # serves the operators while `call` runs

    @property
    def key(self) -> str:
        return f"{self.op}: {self.name}"


@dataclass
class Measured:
    timing: Timing
    how: str


@dataclass
class Outcome:
    measured: dict[str, Measured] = field(default_factory=dict)  # by candidate and ceiling
    errors: dict[str, str] = field(default_factory=dict)


@dataclass
class _Ready:
    run: Callable[[], Any]
    calls: int
    how: str
    waits: bool = False


@triton.jit
def _nothing(x):
    pass


def error_text(error: BaseException) -> str:
    """The first error of a chain: what ends a capture hides what broke it."""
    while error.__context__ is not None:
        error = error.__context__
    text = " ".join(str(error).split()) or "no message"
    kind = "wrong" if isinstance(error, AssertionError) else type(error).__name__
    return f"{kind}: {text[:300]}"


def _served(backend: str | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if backend is None else elf_fast.use_backend(backend)


def _timing(microseconds: list[float]) -> Timing:
    low, median, high = quantiles(microseconds, n=4)
    return Timing(median, low, high)


class Gpu:
    """The current CUDA device. All work goes to one stream, which is also the one of captures, so
    that no autograd node remembers another."""

    device = "cuda"
    compiler = "inductor"
    copy_bytes = 2**30

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        properties = torch.cuda.get_device_properties(0)
        self.l2, self.memory = properties.L2_cache_size, properties.total_memory
        self.stream = torch.cuda.Stream()
        torch.cuda.set_stream(self.stream)
        self.ceilings = self._ceilings()
        self.samples: dict[str, list[float]] = {name: [] for name in CEILINGS}

    def shrink(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def sets(self, size: int) -> int:
        """Sets of buffers of `size` bytes to rotate over."""
        return max(2, min(CALLS, math.ceil(2.5 * self.l2 / max(size, 1))))

    def _ceilings(self) -> dict[str, _Ready]:
        source = torch.randn(self.copy_bytes // 4, device=self.device)
        target = torch.empty_like(source)
        few = torch.randn(16, device=self.device)
        return {
            "copy": self._ready(lambda i: target.copy_(source), 1, 1),
            "read": self._ready(lambda i: source.sum(), 1, 1),
            "empty launch": self._ready(lambda i: _nothing[(1,)](few), CALLS, 1),
        }

    def _waits(self, call: Callable[[int], Any]) -> bool:
        torch.cuda.set_sync_debug_mode("error")
        try:
            call(0)
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            return True
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return False

    def _ready(self, call: Callable[[int], Any], calls: int, sets: int) -> _Ready:
        for i in range(3):
            call(i % sets)
        torch.cuda.synchronize()
        if self._waits(call):

            def loop() -> None:
                for i in range(WAITING_CALLS):
                    call(i % sets)

            return _Ready(loop, WAITING_CALLS, f"{WAITING_CALLS} calls: it waits", waits=True)
        graph = torch.cuda.CUDAGraph()
        # Results stay alive for a turn of the rotation, so that they rotate, too.
        kept: deque[Any] = deque(maxlen=sets)
        with torch.cuda.graph(graph, stream=self.stream):
            for i in range(calls):
                kept.append(call(i % sets))
        graph.replay()
        torch.cuda.synchronize()
        return _Ready(graph.replay, calls, f"CUDA graph of {calls} calls over {sets} sets")

    def alive(self) -> bool:
        """A failed capture can leave the allocator, and a failed kernel the device, unusable."""
        try:
            torch.cuda.synchronize()
            x = torch.zeros(8, device=self.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                x += 1
            graph.replay()
            return float(x.sum()) == 8
        except Exception:
            return False

    def measure(
        self, candidates: list[Candidate], sets: int, size: int, failed: Mapping[str, str],
        mark: Callable[[str], None],
    ) -> Outcome:  # fmt: skip
        """Checks, captures and times candidates whose `sets` sets of buffers have `size` bytes
        each. `failed` were tried before; `mark` hears what is tried next."""
        outcome = Outcome(errors=dict(failed))
        ready: dict[str, _Ready] = {}
        calls = sets * max(1, math.ceil(BYTES / max(size, 1) / sets))
        calls = max(sets, min(calls, CALLS))
        for candidate in candidates:
            name = candidate.key
            if name in failed:
                continue
            mark(name)
            try:
                with _served(candidate.backend):
                    candidate.check(candidate.call)
                    ready[name] = self._ready(candidate.call, calls, sets)
            except Exception as error:
                outcome.errors[name] = error_text(error)
                if not isinstance(error, AssertionError) and not self.alive():
                    raise DeviceLost(outcome.errors) from error
        mark("")
        outcome.measured = self._rounds(ready)
        return outcome

    def _rounds(self, ready: dict[str, _Ready]) -> dict[str, Measured]:
        everything = self.ceilings | dict(sorted(ready.items(), key=lambda item: item[1].waits))
        samples: dict[str, list[float]] = {name: [] for name in everything}
        events = {
            name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in everything
        }
        gc.disable()
        try:
            end = time.perf_counter() + self.seconds
            while time.perf_counter() < end or len(samples["copy"]) < 7:
                torch.cuda._sleep(1_000_000)  # the host gets ahead
                for name, entry in everything.items():
                    events[name][0].record()
                    entry.run()
                    events[name][1].record()
                torch.cuda.synchronize()
                for name, entry in everything.items():
                    elapsed = events[name][0].elapsed_time(events[name][1])
                    samples[name].append(elapsed * 1e3 / entry.calls)
        finally:
            gc.enable()
        for name in CEILINGS:
            self.samples[name] += samples[name]
        return {
            name: Measured(_timing(samples[name]), entry.how) for name, entry in everything.items()
        }

    def ceiling_report(self) -> dict[str, Any]:
        times = {name: _timing(values) for name, values in self.samples.items() if values}
        report: dict[str, Any] = {}
        for name, t in times.items():
            report[name] = {"median_us": t.median, "low": t.low, "high": t.high}
        if times:
            report["copy"]["GB/s"] = 2e-3 * self.copy_bytes / times["copy"].median
            report["read"]["GB/s"] = 1e-3 * self.copy_bytes / times["read"].median
            report["copy"]["bytes"] = 2 * self.copy_bytes
            report["read"]["bytes"] = self.copy_bytes
        return report


class DryRun(Gpu):
    """The same on tiny CPU tensors, by wall clock: for testing the benchmark, not the kernels."""

    device = "cpu"
    compiler = "aot_eager"
    copy_bytes = 2**16

    def __init__(self, seconds: float) -> None:
        self.seconds = 0.0
        self.l2, self.memory = 2**10, 2**30
        self.ceilings = self._ceilings()
        self.samples = {name: [] for name in CEILINGS}

    def shrink(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(min(n, limit) for n, limit in zip(shape, (7, 12, 3, 3), strict=False))

    def sets(self, size: int) -> int:
        return 2

    def _ready(self, call: Callable[[int], Any], calls: int, sets: int) -> _Ready:
        call(sets - 1)
        return _Ready(lambda: call(0), 1, "wall clock, dry run")

    def alive(self) -> bool:
        return True

    def _rounds(self, ready: dict[str, _Ready]) -> dict[str, Measured]:
        measured = {}
        for name, entry in (self.ceilings | ready).items():
            samples = []
            for _ in range(2):
                start = time.perf_counter()
                entry.run()
                samples.append((time.perf_counter() - start) * 1e6)
            measured[name] = Measured(_timing(samples), entry.how)
            if name in CEILINGS:
                self.samples[name] += samples
        return measured
