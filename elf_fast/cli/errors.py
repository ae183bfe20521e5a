"""Errors that the user can correct."""

from __future__ import annotations


class UserError(Exception):
    """An error that is shown as one line on stderr; the exit status is 2."""
