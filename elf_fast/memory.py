"""Tells a lack of memory, and what it does to other processes, from other errors: it is no fault of
the argument that was being tried."""

from __future__ import annotations

import errno

__all__ = ["is_lost_worker", "is_out_of_memory"]

_WORDS = ("can't allocate memory", "cannot allocate memory", "cuda error: out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, Python or the system could not get memory. Torch raises errors of its own, of
    CUDA and, on the CPU, RuntimeErrors."""
    text = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or any(words in text for words in _WORDS)
    )


def is_lost_worker(error: BaseException) -> bool:
    """Whether torch says that a process which loads data has ended, as the system ends one for want
    of memory. A signal handler of torch raises it, wherever the main thread is."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")
