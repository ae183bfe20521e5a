"""Timing of candidates on a GPU, in turn.

A candidate is captured into a CUDA graph of many calls. The calls rotate over sets of buffers,
which together are 2.5 times as large as the L2 cache where memory allows. A round replays the graph
of every candidate, and of three ceilings: a large device-to-device copy, a read-only pass and an
empty kernel. Whatever changes the speed of the device between rounds thus changes it for all of
them.

A candidate that synchronises the host with the device cannot be captured. It is called in a loop
instead, at the end of every round, and is compared only with other candidates that synchronise.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton

import elf_fast
from elf_fast.timing import Quartiles, Samples

#: Calls in a graph, at most.
CALLS = 160
#: Bytes that the calls of one graph move together at least, if `CALLS` allows.
BYTES = 1.2e9
#: Calls in a round of a candidate that synchronises.
SYNCHRONISING_CALLS = 10
CEILINGS = ("copy", "read", "empty launch")


@dataclass(frozen=True)
class Candidate:
    op: str
    name: str
    call: Callable[[int], Any]  # runs it on the i-th set of buffers
    check: Callable[[Callable[[int], Any]], None]  # calls it and raises AssertionError
    bytes: int  # that a call moves at least
    backend: str | None = None  # that serves the operators while `call` runs

    @property
    def key(self) -> str:
        return f"{self.op}: {self.name}"


@dataclass(frozen=True)
class Ready:
    """What a round runs of one candidate."""

    run: Callable[[], Any]
    calls: int
    synchronises: bool = False


@dataclass
class Measured:
    """What `Gpu.measure` found of some candidates, by their keys."""

    #: Microseconds a call, round by round, of candidates and ceilings. Empty: a candidate made the
    #: device unusable.
    samples: Samples = field(default_factory=Samples)
    synchronising: set[str] = field(default_factory=set)
    errors: dict[str, str] = field(default_factory=dict)


@triton.jit
def _nothing(x):
    pass


def error_text(error: BaseException) -> str:
    """The first error of a chain: an error that ends a capture follows from the one before it."""
    while error.__context__ is not None:
        error = error.__context__
    text = " ".join(str(error).split()) or "no message"
    kind = "wrong" if isinstance(error, AssertionError) else type(error).__name__
    return f"{kind}: {text[:300]}"


class Gpu:
    """The current CUDA device. All work goes to one stream, and captures use the same one: an
    autograd node remembers the stream of its forward."""

    device = "cuda"
    compiler = "inductor"
    copy_bytes = 2**30

    def __init__(self, seconds: float) -> None:
        """
        Args:
            seconds: how long the rounds of one case take together.
        """
        self.seconds = seconds
        properties = torch.cuda.get_device_properties(0)
        self.l2, self.memory = properties.L2_cache_size, properties.total_memory
        self.stream = torch.cuda.Stream()
        torch.cuda.set_stream(self.stream)
        self._prepare()

    def _prepare(self) -> None:
        self.samples = Samples({name: [] for name in CEILINGS})
        source = torch.randn(self.copy_bytes // 4, device=self.device)
        target = torch.empty_like(source)
        few = torch.randn(16, device=self.device)
        self.ceilings = {
            "copy": self.ready(lambda i: target.copy_(source), 1, 1),
            "read": self.ready(lambda i: source.sum(), 1, 1),
            "empty launch": self.ready(lambda i: _nothing[(1,)](few), CALLS, 1),
        }

    def clear(self) -> None:
        """Returns the memory of earlier cases to the device, because a capture cannot do that."""
        torch.cuda.empty_cache()

    def shrink(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that is run in the place of `shape`."""
        return shape

    def sets(self, size: int) -> int:
        """How many sets of buffers to rotate over, if a call touches `size` bytes of a set."""
        return max(2, min(CALLS, math.ceil(2.5 * self.l2 / max(size, 1))))

    def _synchronises(self, call: Callable[[int], Any]) -> bool:
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
        """Captures `calls` calls, or makes a loop of them if a call synchronises."""
        for i in range(3):
            call(i % sets)
        torch.cuda.synchronize()
        if self._synchronises(call):

            def loop() -> None:
                for i in range(SYNCHRONISING_CALLS):
                    call(i % sets)

            return Ready(loop, SYNCHRONISING_CALLS, synchronises=True)
        graph = torch.cuda.CUDAGraph()
        # A result lives until its set is used again, so that the results rotate over memory, too.
        kept: deque[Any] = deque(maxlen=sets)
        with torch.cuda.graph(graph, stream=self.stream):
            for i in range(calls):
                kept.append(call(i % sets))
        graph.replay()
        torch.cuda.synchronize()
        return Ready(graph.replay, calls)

    def alive(self) -> bool:
        """Whether the device still works. A failed capture can make the allocator unusable, and a
        failed kernel the device."""
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

    def measure(self, candidates: Sequence[Candidate], sets: int, size: int) -> Measured:
        """Checks, captures and times candidates. A call touches `size` bytes of one of `sets` sets
        of buffers. If an error makes the device unusable, nothing is timed."""
        found, ready = Measured(), {}
        calls = sets * max(1, math.ceil(BYTES / max(size, 1) / sets))
        calls = max(sets, min(calls, CALLS))
        for candidate in candidates:
            served = elf_fast.use_backend(candidate.backend) if candidate.backend else None
            try:
                with served or contextlib.nullcontext():
                    candidate.check(candidate.call)
                    ready[candidate.key] = self.ready(candidate.call, calls, sets)
            except Exception as error:
                found.errors[candidate.key] = error_text(error)
                if not isinstance(error, AssertionError) and not self.alive():
                    return found
        found.synchronising = {key for key, entry in ready.items() if entry.synchronises}
        last = dict(sorted(ready.items(), key=lambda item: item[1].synchronises))
        found.samples = self.rounds(self.ceilings | last)
        for name in CEILINGS:
            self.samples[name] += found.samples[name]
        return found

    def rounds(self, ready: dict[str, Ready]) -> Samples:
        """Microseconds a call, in every round."""
        samples = Samples({name: [] for name in ready})
        events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in ready}
        gc.disable()
        try:
            end = time.perf_counter() + self.seconds
            while time.perf_counter() < end or len(samples["copy"]) < 7:
                torch.cuda._sleep(1_000_000)  # time for the host to queue the round
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
        """Time and bytes per second of each ceiling over all rounds so far. A copy's bytes are
        those that it reads and those that it writes."""
        report = {}
        for name, moved in zip(CEILINGS, (2 * self.copy_bytes, self.copy_bytes, 0), strict=True):
            if self.samples[name]:
                t = Quartiles.of(self.samples[name])
                report[name] = {"median_us": t.median, "low": t.low, "high": t.high}
                report[name] |= {"GB/s": 1e-3 * moved / t.median} if moved else {}
        return report


class DryRun(Gpu):
    """The same with tiny CPU tensors and the clock of the host. It tests the benchmark; its times
    say nothing about the kernels."""

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

    def rounds(self, ready: dict[str, Ready]) -> Samples:
        def microseconds(run: Callable[[], Any]) -> float:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e6

        return Samples(
            {name: [microseconds(entry.run) for _ in range(2)] for name, entry in ready.items()}
        )
