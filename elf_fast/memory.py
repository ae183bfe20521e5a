"""Tells a lack of memory from other errors: it is no fault of the argument that was being tried."""

from __future__ import annotations

import errno

__all__ = ["is_out_of_memory"]

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
