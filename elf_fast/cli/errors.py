"""Errors that the user can correct: one line on stderr, status 2."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

from .. import checks


class UserError(Exception):
    """An error that is shown as one line on stderr; the exit status is 2."""


class Parser(argparse.ArgumentParser):
    """A parser that takes flags by their whole names only and shows a mistake in one line.

    Abbreviations would make `--epoch` mean `--epochs` today and another flag when one is added.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self._refuse(unknown)
        return found, unknown

    def _refuse(self, unknown: list[str]) -> None:
        given = next((text for text in unknown if text.startswith("-")), None)
        if given is None:
            self.error(f"expected no more arguments, got {' '.join(unknown)}")
        flag = given.partition("=")[0]
        near = difflib.get_close_matches(flag, self._option_string_actions)
        hint = f"near flags: {', '.join(near)}" if near else f"{self.prog} --help lists them"
        self.error(f"{flag}: expected a flag of {self.prog}, got none; {hint}")

    def error(self, message: str) -> NoReturn:
        self.exit(fail(message.removeprefix("argument ")))


def fail(message: str) -> int:
    """Shows the message as one line on stderr; returns the exit status."""
    lines = (" ".join(line.split()) for line in message.splitlines())
    print(f"elf-fast: {checks.printable('; '.join(filter(None, lines)))}", file=sys.stderr)
    return 2


def check_path(flag: str, path: Path | str) -> None:
    """Raises a UserError for a path that no file can have."""
    if "\0" in str(path):
        raise UserError(f"{flag}: expected a path without NUL characters, got {str(path)!r}")


def with_flags(message: str, settings: Collection[str]) -> str:
    """The message of an error whose lines may begin with the name of a setting, with the flag in
    its place: `data_dir: expected ...` becomes `--data-dir: expected ...`."""
    lines = []
    for line in message.splitlines():
        name, colon, rest = line.partition(":")
        is_setting = colon and name in settings
        lines.append(f"--{name.replace('_', '-')}:{rest}" if is_setting else line)
    return "\n".join(lines)
