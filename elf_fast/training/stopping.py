"""Signals that ask a run to write a checkpoint and end: a queue sends them before it kills."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..data import ImageLoader
from .processes import Processes, Stopped

#: SIGTERM and SIGHUP from queues and terminals; SIGUSR1 as `sbatch --signal=USR1@60` sends it.
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)


class Stop:
    """Notes the signals of this process while the context is open, and ends all processes of a run
    at the same step if any of them got one.

    Attributes:
        received: for each of `SIGNALS`, 1 if it came, else 0.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.received = [0] * len(SIGNALS)
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # others may set no handler
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup ignores SIGHUP
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        while self._before:
            number, before = self._before.popitem()
            signal.signal(number, signal.SIG_DFL if before is None else before)

    def _note(self, number: int, frame: object) -> None:
        self.received[SIGNALS.index(number)] = 1

    def agree(self) -> None:
        """Every process calls this. Raises `Stopped` in all of them if any got a signal."""
        self.check(self.processes.total(torch.tensor(self.received)).tolist())

    def check(self, received: Sequence[int]) -> None:
        """Raises `Stopped` for `received` of this process, or the sum of that of all."""
        for number, times in zip(SIGNALS, received, strict=True):
            if times:
                raise Stopped(number)

    def watched(self, batches: ImageLoader) -> Any:
        """The loader. Its iteration stops early at a signal, and always ends with `agree`."""
        return _Watched(batches, self)


class _Watched:
    def __init__(self, batches: ImageLoader, stop: Stop) -> None:
        self._batches, self._stop = batches, stop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            if any(self._stop.received):
                break
            yield batch
        # Only here, because processes may have unequally many batches.
        self._stop.agree()
