"""The numbers of schedulers as metrics of `prometheus_client`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakValueDictionary

__all__ = ["register"]


class _Source(Protocol):
    def stats(self) -> dict[str, Any]: ...


def register(source: _Source, registry: Any = None, name: str | None = None) -> None:
    """See `Scheduler.register`."""
    try:
        import prometheus_client
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "register: expected prometheus_client, got no such module; install elf-fast[serve]",
            name="prometheus_client",
        ) from error
    registry = prometheus_client.REGISTRY if registry is None else registry
    collector = _collectors.get(registry)
    if collector is None:
        collector = _Collector()
        registry.register(collector)
        _collectors[registry] = collector
    collector.add(source, name)


class _Collector:
    """Asked by a registry for the numbers of all schedulers in it."""

    def __init__(self) -> None:
        self._sources: WeakValueDictionary[str, _Source] = WeakValueDictionary()
        self._registered = 0

    def add(self, source: _Source, name: str | None) -> None:
        if any(other is source for other in self._sources.values()):
            return
        if name is not None and name in self._sources:
            raise ValueError(f"name: expected one that no other scheduler has, got {name!r}")
        while name is None or name in self._sources:
            name, self._registered = str(self._registered), self._registered + 1
        self._sources[name] = source

    def describe(self) -> Iterator[Any]:
        """The metrics' names. Registering asks for them."""
        return iter(_metrics([]))

    def collect(self) -> Iterator[Any]:
        return iter(_metrics([(name, s.stats()) for name, s in list(self._sources.items())]))


#: One for each registry.
_collectors: WeakKeyDictionary[Any, _Collector] = WeakKeyDictionary()


def _metrics(found: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
    )

    requests = CounterMetricFamily(
        "elf_fast_requests", "Requests by what became of them.", labels=["scheduler", "outcome"]
    )
    waiting = GaugeMetricFamily(
        "elf_fast_waiting_samples", "Samples that wait for a stage.", labels=["scheduler", "stage"]
    )
    by_stage = {
        key: CounterMetricFamily(f"elf_fast_{name}", text, labels=["scheduler", "stage"])
        for key, name, text in (
            ("runs", "batches", "Batches that a stage ran."),
            ("refilled", "refilled_batches", "Batches whose samples came at several times."),
            ("samples", "stage_samples", "Samples that a stage ran."),
            ("busy_ms", "stage_seconds", "Seconds for which a stage ran."),
        )
    }
    latency = HistogramMetricFamily(
        "elf_fast_latency_seconds", "From a request's arrival to a sample's exit.",
        labels=["scheduler", "exit"],
    )  # fmt: skip
    for name, stats in found:
        for outcome, n in stats["requests"].items():
            requests.add_metric([name, outcome], n)
        for e, stage in enumerate(stats["stages"]):
            waiting.add_metric([name, str(e)], stage["waiting"])
            for key, family in by_stage.items():
                family.add_metric([name, str(e)], stage[key] / (1e3 if key == "busy_ms" else 1))
        for e, left in enumerate(stats["exits"]):
            latency.add_metric([name, str(e)], *_cumulative(left))
    return [requests, waiting, *by_stage.values(), latency]


def _cumulative(left: dict[str, Any]) -> tuple[list[tuple[str, float]], float]:
    """(upper bound in seconds, samples up to there) of a latency, and the sum in seconds."""
    total, buckets = 0, []
    for bound, n in left["histogram"]:
        total += n
        buckets.append(("+Inf" if bound == float("inf") else f"{bound / 1e3:g}", float(total)))
    return buckets, left["mean_ms"] * left["samples"] / 1e3
