"""The memory of a queue: rows come out as they went in, and a batch that is out is not touched."""

from __future__ import annotations

import random

import pytest
import torch

from elf_fast.inference import Request
from elf_fast.inference.queues import Slot, StageQueue


@pytest.mark.parametrize("seed", range(20))
def test_rows_come_out_as_they_went_in(seed):
    rng = random.Random(seed)
    queue = StageQueue(lambda n: torch.full((n, 1), float("nan")), least=8)
    waiting: list[tuple[Request, float]] = []
    out: tuple[torch.Tensor, list[float]] | None = None
    value = 0.0
    for _ in range(400):
        action = rng.choice(("add", "take", "release", "drop"))
        if action == "add":
            n = rng.randint(1, 5)
            request = Request(torch.zeros(n, 1))
            new = [value + i for i in range(n)]
            value += n
            pieces = queue.room(n)
            assert [len(piece) for piece in pieces] in ([n], [len(pieces[0]), n - len(pieces[0])])
            for piece, values in zip(pieces, (new, new[len(pieces[0]) :]), strict=False):
                piece[:, 0] = torch.tensor(values[: len(piece)])
            queue.push(Slot(request, i, new[i]) for i in range(n))
            waiting += [(request, v) for v in new]
        elif action == "take" and waiting and out is None:
            n = rng.randint(1, len(waiting))
            batch, slots = queue.take(n)
            taken, waiting = waiting[:n], waiting[n:]
            assert [(slot.request, slot.entered) for slot in slots] == taken
            out = batch, [v for _, v in taken]
        elif action == "release" and out is not None:
            queue.release()
            out = None
        elif action == "drop" and waiting:
            request = rng.choice(waiting)[0]
            assert queue.drop(request) == sum(other is request for other, _ in waiting)
            waiting = [item for item in waiting if item[0] is not request]
        assert len(queue) == len(waiting)
        assert queue.oldest == (waiting[0][1] if waiting else float("inf"))
        if out is not None:
            assert out[0][:, 0].tolist() == out[1]


def test_a_batch_is_a_view_and_memory_is_used_again():
    made = []

    def allocate(n):
        made.append(torch.empty(n, 1))
        return made[-1]

    queue = StageQueue(allocate, least=8)
    for _ in range(10):
        request = Request(torch.zeros(4, 1))
        queue.room(4)
        queue.push(Slot(request, i, 0.0) for i in range(4))
        batch, _ = queue.take(4)
        assert batch.data_ptr() == made[0].data_ptr()
        queue.release()
    assert len(made) == 1
