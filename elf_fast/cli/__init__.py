"""The command `elf-fast`: `main` chooses, and every command has a file of its own."""

from .main import main

__all__ = ["main"]
