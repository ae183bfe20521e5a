"""The folder in which compiled code and measured times are kept between processes."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from .parts import Example, Part

#: Changes when code of earlier versions must not be used any more.
FORMAT = 1

__all__ = ["Entry", "default_folder", "key_of"]


def default_folder() -> Path:
    """$XDG_CACHE_HOME/elf_fast/engines, or ~/.cache/elf_fast/engines."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "elf_fast" / "engines"


def key_of(parts: Sequence[Part], examples: Sequence[Example], settings: Any) -> str:
    """A name for code of these parts, settings, versions and this machine."""
    digest = hashlib.sha256()
    x = examples[0].x
    about = [
        FORMAT, torch.__version__, platform.machine(), _processor(),
        torch.get_num_threads(), settings, list(x.shape[1:]), str(x.dtype), list(x.stride()[1:]),
    ]  # fmt: skip
    digest.update(json.dumps(about).encode())
    for part in parts:
        for name, module in part.named_modules():
            digest.update(f"{name} {_described(module)}".encode())
        for name, tensor in chain(part.named_parameters(), part.named_buffers()):
            digest.update(name.encode())
            _add_tensor(digest, tensor)
        for value in (v for module in part.modules() for v in vars(module).values()):
            if isinstance(value, Tensor):
                _add_tensor(digest, value)
    return digest.hexdigest()[:32]


def _described(module: nn.Module) -> str:
    """Its class with the source of that, and its attributes that are numbers, names and such."""
    kind = type(module)
    code = module.code if isinstance(module, fx.GraphModule) else _source(kind)
    simple = (bool, int, float, str, torch.dtype, type(None))
    attributes = {
        name: value
        for name, value in sorted(vars(module).items())
        if isinstance(value, simple)
        or (isinstance(value, (tuple, list)) and all(isinstance(v, simple) for v in value))
    }
    return f"{kind.__module__}.{kind.__qualname__} {module.extra_repr()} {attributes} {code}"


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # a class made in a console
        return ""


def _add_tensor(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")


def _processor() -> str:
    """The model and the instruction sets, on which compiled code depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features")
    found = dict(line.partition(":")[::2] for line in lines if line.startswith(wanted))
    return json.dumps(found, sort_keys=True)


class Entry:
    """A folder of files that appears under its key when it is complete, and not before."""

    def __init__(self, root: Path | None, key: str) -> None:
        """root: None keeps nothing."""
        self.path = None if root is None else root / key
        self._working: Path | None = None

    def read(self) -> dict[str, Any] | None:
        """What `finish` wrote, or None."""
        if self.path is None:
            return None
        try:
            found = json.loads((self.path / "engine.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def working(self) -> Path:
        """A new folder for files of this entry; None as the root: a temporary one.

        Raises:
            OSError: it cannot be made.
        """
        if self._working is None:
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            parent = None if self.path is None else self.path.parent
            self._working = Path(tempfile.mkdtemp(prefix=".new-", dir=parent))
        return self._working

    def finish(self, about: dict[str, Any]) -> None:
        """Makes the working folder the entry, in place of one that was there. A temporary one stays
        until `close`."""
        if self.path is None:
            return
        working = self.working()
        (working / "engine.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        working.chmod(0o755)  # others may read what one user has compiled
        shutil.rmtree(self.path, ignore_errors=True)
        try:
            os.replace(working, self.path)
            self._working = None
        except OSError:
            if self.read() is None:
                raise
            self.close()  # another process has just made the same entry

    def close(self) -> None:
        """Removes what is not finished or temporary."""
        if self._working is not None:
            shutil.rmtree(self._working, ignore_errors=True)
            self._working = None
