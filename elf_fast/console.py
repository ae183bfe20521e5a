"""The console of commands: it shows texts as they are and outlives the reader of stdout."""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.text import Text

from .checks import printable

__all__ = ["LastingConsole", "say"]


class LastingConsole(Console):
    """Goes on in silence when the reader of stdout (`| head`) has ended. rich's own then ends the
    process without a word."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit


def say(console: Console, text: str) -> None:
    """Prints a line as it is. In a string, rich would take the [b] or :x: of a path for its own."""
    console.print(Text(printable(text)), soft_wrap=True)
