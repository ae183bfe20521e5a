"""The image files that a user names for prediction: files, folders and lists."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from .splits import DataError
from .tree import EXTENSIONS, find_images

#: What stands for the list on standard input.
STDIN = "-"
_LIST = ".txt"


class Inputs(NamedTuple):
    paths: list[str]  # in the order of the arguments; an image may come twice
    left_out: list[str]  # what the folders hold beside images, in words, one text per folder


def image_paths(given: Sequence[str | os.PathLike[str]]) -> Inputs:
    """The images that files, folders and lists name.

    Args:
        given: image files, whatever their extension; folders, whose images are found at any depth,
            by the rules of docs/data.md; lists, named .txt, with one path per line, relative to the
            list's folder; and "-", a list on standard input, relative to the working folder.

    Raises:
        DataError: an argument names nothing that exists, a folder without images, or a list without
            lines. Files that a list names are not looked at.
    """
    paths: list[str] = []
    left_out = []
    for argument in given:
        name = os.fspath(argument)
        if name == STDIN:
            paths += _lines("standard input", sys.stdin.buffer.read(), "")
        elif os.path.isdir(name):
            found, rest = find_images(name)
            if not found:
                raise DataError(
                    f"{name}: expected images, got {rest or 'an empty folder'}; the extensions of "
                    f"images are {' '.join(EXTENSIONS)}"
                )
            paths += found
            left_out += [f"{name}: {rest}"] if rest else []
        elif not os.path.exists(name):
            raise DataError(f"{name}: expected an image, a folder or a list, found none")
        elif name.lower().endswith(_LIST):
            with open(name, "rb") as file:
                paths += _lines(name, file.read(), os.path.dirname(name))
        else:
            paths.append(name)
    return Inputs(paths, left_out)


def _lines(name: str, content: bytes, folder: str) -> list[str]:
    lines = content.removeprefix(b"\xef\xbb\xbf").splitlines()
    found = [os.path.join(folder, os.fsdecode(line)) for line in lines if line.strip()]
    if not found:
        raise DataError(f"{name}: expected one path per line, got no line")
    return found
