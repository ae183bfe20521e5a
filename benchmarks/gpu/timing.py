"""Timing on a GPU, side by side.

A candidate is captured into a CUDA graph of many calls that rotate over sets of buffers, together
2.5 times as large as the L2 cache where they can be; rounds replay every candidate's graph in turn,
with three ceilings: a large device-to-device copy, a read-only pass and empty kernels. So whatever
the device does between rounds falls on all of them. Medians and quartiles over the rounds, a call.
What waits for the device cannot be captured; it is called in a loop, last in every round, and
compared only with what waits, too.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

import elf_fast
from elf_fast.bench.timing import Quartiles

#: Calls in a graph, at most, and the bytes that a graph of long ones moves at least.
CALLS = 160
BYTES = 1.2e9
#: Calls of a candidate that waits, in a round.
WAITING_CALLS = 10
CEILINGS = ("copy", "read", "empty launch")


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Ready:
    """What a round runs."""

    run: Callable[[], Any]
    calls: int
    waits: bool = False


@dataclass(frozen=True)
class Measured:
    timing: Quartiles
    waits: bool


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


def _timing(microseconds: list[float]) -> Quartiles:
    return Quartiles.of(microseconds)


class Gpu:
    """The current CUDA device. All work goes to one stream, which is also the one of captures, so
    that no autograd node remembers another."""

    device = "cuda"
    compiler = "inductor"
    copy_bytes = 2**30

    def __init__(self, seconds: float) -> None:
        """seconds: what the rounds of one case take."""
        self.seconds = seconds
        properties = torch.cuda.get_device_properties(0)
        self.l2, self.memory = properties.L2_cache_size, properties.total_memory
        self.stream = torch.cuda.Stream()
        torch.cuda.set_stream(self.stream)
        self._prepare()

    def _prepare(self) -> None:
        self.samples: dict[str, list[float]] = {name: [] for name in CEILINGS}
        source = torch.randn(self.copy_bytes // 4, device=self.device)
        target = torch.empty_like(source)
        few = torch.randn(16, device=self.device)
        self.ceilings = {
            "copy": self.ready(lambda i: target.copy_(source), 1, 1),
            "read": self.ready(lambda i: source.sum(), 1, 1),
            "empty launch": self.ready(lambda i: _nothing[(1,)](few), CALLS, 1),
        }

    def clear(self) -> None:
        """Returns the memory of earlier cases: a capture cannot."""
        torch.cuda.empty_cache()

    def shrink(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape to run for one that is asked for."""
        return shape

    def sets(self, size: int) -> int:
        """Sets of buffers to rotate over, where a call touches `size` bytes of one."""
        return max(2, min(CALLS, math.ceil(2.5 * self.l2 / max(size, 1))))

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

    def ready(self, call: Callable[[int], Any], calls: int, sets: int) -> Ready:
        for i in range(3):
            call(i % sets)
        torch.cuda.synchronize()
        if self._waits(call):

            def loop() -> None:
                for i in range(WAITING_CALLS):
                    call(i % sets)

            return Ready(loop, WAITING_CALLS, waits=True)
        graph = torch.cuda.CUDAGraph()
        # Results stay alive for a turn of the rotation, so that they rotate, too.
        kept: deque[Any] = deque(maxlen=sets)
        with torch.cuda.graph(graph, stream=self.stream):
            for i in range(calls):
                kept.append(call(i % sets))
        graph.replay()
        torch.cuda.synchronize()
        return Ready(graph.replay, calls)

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
        self, candidates: Sequence[Candidate], sets: int, size: int
    ) -> tuple[dict[str, Measured], dict[str, str]]:
        """Checks, captures and times candidates, a call of which touches `size` bytes of one of
        `sets` sets of buffers.

        Returns: what was measured, by candidate and ceiling; and errors, by candidate. After an
        error that the device did not survive nothing is measured.
        """
        ready, errors = {}, {}
        calls = sets * max(1, math.ceil(BYTES / max(size, 1) / sets))
        calls = max(sets, min(calls, CALLS))
        for candidate in candidates:
            served = elf_fast.use_backend(candidate.backend) if candidate.backend else None
            try:
                with served or contextlib.nullcontext():
                    candidate.check(candidate.call)
                    ready[candidate.key] = self.ready(candidate.call, calls, sets)
            except Exception as error:
                errors[candidate.key] = error_text(error)
                if not isinstance(error, AssertionError) and not self.alive():
                    return {}, errors
        everything = self.ceilings | dict(sorted(ready.items(), key=lambda item: item[1].waits))
        samples = self.rounds(everything)
        for name in CEILINGS:
            self.samples[name] += samples[name]
        return {
            name: Measured(_timing(samples[name]), entry.waits)
            for name, entry in everything.items()
        }, errors

    def rounds(self, ready: dict[str, Ready]) -> dict[str, list[float]]:
        """Microseconds a call, in every round."""
        samples: dict[str, list[float]] = {name: [] for name in ready}
        events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in ready}
        gc.disable()
        try:
            end = time.perf_counter() + self.seconds
            while time.perf_counter() < end or len(samples["copy"]) < 7:
                torch.cuda._sleep(1_000_000)  # the host gets ahead
                for name, entry in ready.items():
                    events[name][0].record()
                    entry.run()
                    events[name][1].record()
                torch.cuda.synchronize()
                for name, entry in ready.items():
                    elapsed = events[name][0].elapsed_time(events[name][1])
                    samples[name].append(elapsed * 1e3 / entry.calls)
        finally:
            gc.enable()
        return samples

    def ceiling_report(self) -> dict[str, dict[str, float]]:
        """Over all rounds so far: time, and bytes (for the copy: read plus written) over it."""
        report = {}
        for name, moved in zip(CEILINGS, (2 * self.copy_bytes, self.copy_bytes, 0), strict=True):
            if self.samples[name]:
                t = _timing(self.samples[name])
                report[name] = {"median_us": t.median, "low": t.low, "high": t.high}
                report[name] |= {"GB/s": 1e-3 * moved / t.median} if moved else {}
        return report


class DryRun(Gpu):
    """The same on tiny CPU tensors, by wall clock: for testing the benchmark, not the kernels."""

    device = "cpu"
    compiler = "aot_eager"
    copy_bytes = 2**16
    l2, memory = 2**10, 2**30

    def __init__(self) -> None:
        self._prepare()

    def shrink(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(min(n, limit) for n, limit in zip(shape, (7, 12, 3, 3), strict=False))

    def sets(self, size: int) -> int:
        return 2

    def ready(self, call: Callable[[int], Any], calls: int, sets: int) -> Ready:
        call(sets - 1)
        return Ready(lambda: call(0), 1)

    def alive(self) -> bool:
        return True

    def clear(self) -> None:
        pass

    def rounds(self, ready: dict[str, Ready]) -> dict[str, list[float]]:
        def microseconds(run: Callable[[], Any]) -> float:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e6

        return {name: [microseconds(entry.run) for _ in range(2)] for name, entry in ready.items()}
