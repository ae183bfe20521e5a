"""Errors that the user can correct."""

from __future__ import annotations

from pathlib import Path


class UserError(Exception):
    """An error that is shown as one line on stderr; the exit status is 2."""


def check_path(flag: str, path: Path | str) -> None:
    """Raises a UserError for a path that no file can have."""
    if "\0" in str(path):
        raise UserError(f"{flag}: expected a path without NUL characters, got {str(path)!r}")
