"""The command `elf-fast`: `main` parses the arguments; every subcommand has a file of its own."""

from .main import main

__all__ = ["main"]
