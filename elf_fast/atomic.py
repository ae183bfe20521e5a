"""Writes files completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = ["partial", "sync_folder", "write", "writing"]


def write(path: Path, content: bytes) -> None:
    """Writes a file completely or not at all: see `writing`."""
    with writing(path) as file:
        file.write(content)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A file to write `path` into, completely or not at all: it has another name beside `path`, and
    is flushed to disk and renamed if the context ends without an error. A link is replaced: in the
    Hub's cache other snapshots use its target."""
    written = partial(path)
    try:
        with open(written, "wb") as file:
            yield file
            file.flush()
            _sync(file.fileno())
        os.replace(written, path)
    except OSError as error:
        if error.filename in (None, str(written)):  # the error of a full disk names no file
            error.filename = str(path)
        raise
    finally:
        written.unlink(missing_ok=True)
    sync_folder(path.parent)


def partial(path: Path) -> Path:
    """The name under which this process writes `path`."""
    return path.with_name(f"{path.name}.{os.getpid()}.partial")


def sync_folder(folder: Path) -> None:
    """Flushes a folder's list of files to disk, so that a rename survives a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    """Flushes to disk, where the file system can: some network shares cannot."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
