"""`StageQueue`: samples that wait for one stage, in memory of which a batch is a view."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from .request import Request

__all__ = ["Slot", "StageQueue"]


class Slot(NamedTuple):
    """Who a row of a queue or of a batch is."""

    request: Request
    sample: int  # its index in the request
    entered: float  # seconds on the scheduler's clock at which it entered this queue


class StageQueue:
    """First in, first out. The rows lie in a ring that grows; dropped rows stay until the head
    passes them. One batch at a time may be out; its rows are kept until `release`."""

    def __init__(self, allocate: Callable[[int], Tensor], least: int) -> None:
        """allocate(n): memory [n, ...] for inputs of the stage. least: rows at the beginning."""
        self._allocate = allocate
        self._least = least
        self._memory: Tensor | None = None
        self._head = 0
        self._slots: deque[Slot | None] = deque()  # of the rows from the head on; None: dropped
        self._live = 0
        self._out = 0  # rows before the head that a batch still reads

    def __len__(self) -> int:
        """Samples that wait."""
        return self._live

    @property
    def oldest(self) -> float:
        """When the first of them entered; infinity for an empty queue."""
        return next((slot.entered for slot in self._slots if slot is not None), math.inf)

    def earliest_deadline(self) -> float:
        deadlines = (s.request.deadline for s in self._slots if s is not None)
        return min((d for d in deadlines if d is not None), default=math.inf)

    def room(self, n: int) -> list[Tensor]:
        """Memory [a, ...] and, where the ring ends in between, [n - a, ...] for the next n samples.
        They wait once `push` has named them."""
        held = len(self._slots)
        if not held and not self._out:
            self._head = 0  # the rows that the caches may still hold
        if self._memory is None or held + self._out + n > len(self._memory):
            self._grow(held + n)
        return self._pieces(held, n)

    def push(self, slots: Iterable[Slot]) -> None:
        for slot in slots:
            self._slots.append(slot)
            self._live += 1

    def take(self, n: int) -> tuple[Tensor, list[Slot]]:
        """The first n samples and who they are. A view of the queue's memory, unless dropped rows
        or the end of the ring lie in between."""
        assert self._memory is not None
        rows, slots = list[int](), list[Slot]()
        passed = 0
        while len(slots) < n:
            slot = self._slots.popleft()
            if slot is not None:
                slots.append(slot)
                rows.append(passed)
            passed += 1
        pieces = self._pieces(0, passed)
        batch = pieces[0]
        if len(pieces) > 1:
            batch = self._allocate(passed)
            batch[: len(pieces[0])] = pieces[0]
            batch[len(pieces[0]) :] = pieces[1]
        if passed > n:
            dense = self._allocate(n)
            ops.compact_into(dense, batch, torch.tensor(rows, device=batch.device), None)
            batch = dense
        self._live -= n
        self._out = passed
        self._head = (self._head + passed) % len(self._memory)
        return batch, slots

    def release(self) -> None:
        """The batch that is out is not read any more."""
        self._out = 0

    def drop(self, request: Request) -> int:
        """Takes the samples of a request out. Returns how many there were."""
        kept = [None if s is not None and s.request is request else s for s in self._slots]
        before, self._live = self._live, sum(slot is not None for slot in kept)
        self._slots = deque(kept)
        while self._slots and self._slots[0] is None:
            self._slots.popleft()
            self._pass(1)
        return before - self._live

    def _pass(self, rows: int) -> None:
        """Moves the head on. Rows behind it are kept as long as a batch is out."""
        assert self._memory is not None
        self._head = (self._head + rows) % len(self._memory)
        self._out += rows if self._out else 0

    def _pieces(self, first: int, n: int) -> list[Tensor]:
        """n rows of the ring from row `first` after the head on."""
        assert self._memory is not None
        size = len(self._memory)
        start = (self._head + first) % size
        if start + n <= size:
            return [self._memory[start : start + n]]
        return [self._memory[start:], self._memory[: start + n - size]]

    def _grow(self, rows: int) -> None:
        """Moves to larger memory. A batch that is out keeps the memory that it reads."""
        memory = self._allocate(max(self._least, 2 * rows))
        filled = 0
        for piece in self._pieces(0, len(self._slots)) if self._slots else ():
            memory[filled : filled + len(piece)] = piece
            filled += len(piece)
        self._memory, self._head, self._out = memory, 0, 0
