"""Errors that the user can correct."""

from __future__ import annotations

from pathlib import Path


class UserError(Exception):
    """An error that is shown as one line on stderr; the exit status is 2."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python could not get memory. On the CPU torch raises a RuntimeError."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def check_path(flag: str, path: Path | str) -> None:
    """Raises a UserError for a path that no file can have."""
    if "\0" in str(path):
        raise UserError(f"{flag}: expected a path without NUL characters, got {str(path)!r}")
