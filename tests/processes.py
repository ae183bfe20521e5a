"""Runs in processes of their own, alone or several in a gloo group, that a test may kill."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import torch

_context = multiprocessing.get_context("forkserver")  # imports modules only once
_context.set_forkserver_preload(
    ["elf_fast.training.trainer", "timm.optim", "sklearn.datasets", "torchvision"]
)


def start(ranks: int, task: Callable, *arguments: Any) -> list[BaseProcess]:
    """Runs task(*arguments) in `ranks` processes; if several, with torchrun's environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        _context.Process(target=_run, args=(rank, ranks, port, task, arguments))
        for rank in range(ranks)
    ]
    for process in started:
        process.start()
    return started


def _run(rank: int, ranks: int, port: int, task: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` makes it ignored
    if ranks > 1:
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in group.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    task(*arguments)


def kill(started: list[BaseProcess]) -> None:
    """Sends SIGKILL to the processes that still run."""
    for process in started:
        process.kill()
    for process in started:
        process.join()


def wait(started: list[BaseProcess], seconds: float = 90.0) -> list[int | None]:
    """Exit codes; -9 (SIGKILL) where a process had not ended within `seconds`."""
    end = time.monotonic() + seconds
    for process in started:
        process.join(max(0.0, end - time.monotonic()))
    kill(started)
    return [process.exitcode for process in started]
