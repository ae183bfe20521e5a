"""Tells a lack of memory from other errors: it is no fault of the argument that was being tried."""

from __future__ import annotations

__all__ = ["is_out_of_memory"]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python could not get memory. On the CPU torch raises a RuntimeError."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )
