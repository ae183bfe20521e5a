"""The lock of a run's folder: a file with the name of the process that writes there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

NAME = "run.lock"

#: What this process wrote into the locks that it holds. A lock of the kernel does not exclude the
#: process that holds it, so these are remembered here.
_held: dict[str, dict[str, Any]] = {}


class Lock:
    """A folder that only this process may write into, while the context is open.

    The kernel holds the lock for this process and frees it however the process ends, and the file
    says who holds it. On file systems without locks the process that the file names counts.

    Raises (when the context is entered):
        FileExistsError: another process holds the lock, or one of another machine left its file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / NAME
        self._place = os.path.realpath(folder)
        self._descriptor: int | None = None

    def __enter__(self) -> Lock:
        self.folder.mkdir(parents=True, exist_ok=True)
        owner = _me()
        if self._place in _held:
            raise self._in_use(_held[self._place])
        while self._descriptor is None:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                is_free = _lock(descriptor)
                if self._is_file_of(descriptor):  # else its owner has just removed it
                    self._refuse_if_owned(descriptor, is_free)
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, json.dumps(owner).encode(), 0)
                    self._descriptor = descriptor
            finally:
                if self._descriptor is None:
                    os.close(descriptor)
        _held[self._place] = owner
        return self

    def __exit__(self, *error: object) -> None:
        assert self._descriptor is not None
        if self._is_mine(self._descriptor):
            self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None
        _held.pop(self._place, None)

    def check(self) -> None:
        """Raises FileNotFoundError if the folder or its lock was deleted, moved or replaced."""
        if self._descriptor is None or not self._is_mine(self._descriptor):
            why = "the run stops: its folder was deleted or moved, or taken by another run"
            raise FileNotFoundError(errno.ENOENT, why, str(self.folder))

    def _is_file_of(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(descriptor))
        except OSError:
            return False

    def _is_mine(self, descriptor: int) -> bool:
        """Whether the file is there and names this run. Where locks do not work between machines,
        another run may have taken it."""
        mine = _held[self._place]
        return self._is_file_of(descriptor) and _owner(os.pread(descriptor, 4096, 0)) == mine

    def _refuse_if_owned(self, descriptor: int, is_free: bool | None) -> None:
        owner = _owner(os.pread(descriptor, 4096, 0))
        if is_free is False:
            raise self._in_use(owner)
        if owner is None:
            return
        me, cure = _me(), f"; if that run has ended, delete {self.path}"
        same_kernel = owner.get("boot") == me["boot"] != ""
        if is_free and same_kernel:  # the kernel would know, also if a container changed the name
            return
        if owner["host"] != me["host"]:
            raise self._in_use(owner, cure)
        if is_free is None and owner["pid"] != me["pid"] and _runs(owner["pid"]):
            raise self._in_use(owner, cure)

    def _in_use(self, owner: dict[str, Any] | None, cure: str = "") -> FileExistsError:
        who = "another run"
        if owner is not None:
            who = f"a run on {owner['host']}, process {owner['pid']}, started {owner['started']}"
        return FileExistsError(
            errno.EEXIST, f"is in use by {who}: wait, or choose another folder{cure}",
            str(self.folder),
        )  # fmt: skip


def _me() -> dict[str, Any]:
    boot = ""  # an identifier of the running kernel
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": started, "boot": boot}


def _owner(content: bytes) -> dict[str, Any] | None:
    """Who wrote the file; None if nobody has, or what is there is not a lock's."""
    with contextlib.suppress(ValueError, TypeError, LookupError):
        owner = json.loads(content)
        if isinstance(owner["host"], str) and isinstance(owner["pid"], int):
            return {"started": "at an unknown time", **owner}
    return None


def _lock(descriptor: int) -> bool | None:
    """Whether the kernel gives this process the lock; None if the file system has no locks."""
    try:
        # Not flock, which worker processes inherit and would hold after the end of this one.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # a process of another user
        return True
    return True
