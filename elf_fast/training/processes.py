"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn

from .. import checks
from ..memory import is_out_of_memory

#: How long a process waits for another one in a collective, before it ends with an error. All wait
#: while the first one writes a checkpoint, and a compiler may take minutes; NCCL's own default is
#: the same, Gloo's three times as long.
TIMEOUT = timedelta(minutes=10)
#: The variables of the environment by which a process joins the others.
_TORCHRUN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Stopped(SystemExit):
    """A signal asked the run to end, and all its processes do. If nobody catches it, the process
    ends with status 128 + signal, as shells and queues expect."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


@dataclass(frozen=True)
class Processes:
    """This process among those of the run. With one process the methods do nothing."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, on all of them."""
        if self.world_size > 1:
            values = values.to(self.device, copy=True)
            distributed.all_reduce(values)
        return values.cpu()

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, on all of them."""
        values = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            distributed.all_gather_object(values, value)
        return values

    def share_buffers(self, model: nn.Module) -> None:
        """Copies the first process's buffers to all: running statistics differ between them."""
        if self.world_size > 1:
            for buffer in model.buffers():
                distributed.broadcast(buffer, 0)


@contextlib.contextmanager
def joined(device: str | None = None) -> Iterator[Processes]:
    """Joins the process group that torchrun's environment asks for (WORLD_SIZE), if any: NCCL on
    GPUs, one per process, and Gloo on CPUs. device: None takes a GPU if there is one.

    Raises:
        ValueError: torch lacks the device, or variables of the environment are missing or wrong.
    """
    own = checks.device(device)
    if "WORLD_SIZE" not in os.environ:
        yield Processes(own)
        return
    if own.type == "cuda":
        if "LOCAL_RANK" not in os.environ:
            raise _cannot_join("LOCAL_RANK is missing")
        own = checks.device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(own)
    try:
        distributed.init_process_group("nccl" if own.type == "cuda" else "gloo", timeout=TIMEOUT)
    except (ValueError, LookupError, RuntimeError) as error:  # sockets raise RuntimeErrors
        if is_out_of_memory(error):
            raise
        raise _cannot_join(error) from error
    try:
        yield Processes(own, distributed.get_rank(), distributed.get_world_size())
    except Stopped:
        distributed.destroy_process_group()
        raise
    # Not after an error: other processes may wait in a collective that this process never enters.
    distributed.destroy_process_group()


def _cannot_join(why: object) -> ValueError:
    shown = " ".join(f"{name}={os.environ.get(name, '(none)')}" for name in _TORCHRUN)
    return ValueError(
        f"the processes cannot join: {why}; WORLD_SIZE is set, and the variables of torchrun are "
        f"{shown}"
    )
