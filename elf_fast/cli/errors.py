"""What the user can put right."""

from __future__ import annotations


class UserError(Exception):
    """Shown as one line on stderr; the exit status is 2."""
