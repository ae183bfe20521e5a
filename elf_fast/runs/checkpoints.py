"""Checkpoints of a run: folders with all it needs to resume, written completely or not at all.

step-00001200/
    model.safetensors   weights, thresholds and temperatures; settings and class counts
    ema.safetensors     the same with the averaged weights, if there are any
    state.pt            optimiser, scaler, random generators, progress
    manifest.json       SHA-256 of each file, to check that they belong together
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..memory import is_out_of_memory
from . import files
from .files import CheckpointError

FORMAT = "elf_fast run checkpoint 1"
KEPT = 2  # the newest, and the one before it in case the newest is damaged
WEIGHTS, AVERAGE, STATE, MANIFEST = (
    "model.safetensors", "ema.safetensors", "state.pt", "manifest.json"
)  # fmt: skip


class Checkpoint(NamedTuple):
    path: Path
    weights: dict[str, Tensor]
    average: dict[str, Tensor] | None
    state: dict[str, Any]
    metadata: dict[str, Any]


def save(
    folder: Path,
    step: int,
    weights: dict[str, Tensor],
    average: dict[str, Tensor] | None,
    state: dict[str, Any],
    metadata: dict[str, Any],
) -> Path:
    """Writes folder/step-<step> and removes all but the newest `KEPT`.

    Args:
        state: tensors, numbers, lists and dicts, which `torch.load(weights_only=True)` can read.
        metadata: anything that JSON can hold.
    """
    path = folder / f"step-{step:08}"
    partial = folder / f"{path.name}.partial"
    _remove(partial)
    partial.mkdir(parents=True)
    files.save(partial / WEIGHTS, weights, metadata)
    if average is not None:
        files.save(partial / AVERAGE, average, metadata)
    content = io.BytesIO()
    torch.save(state, content)
    files.write(partial / STATE, content.getvalue())
    digests = {file.name: _sha256(file.read_bytes()) for file in sorted(partial.iterdir())}
    described = json.dumps({"format": FORMAT, "files": digests}, indent=1)
    files.write(partial / MANIFEST, described.encode())
    _remove(path)  # a damaged checkpoint of this step, if the run was resumed from an older one
    os.replace(partial, path)
    files.sync_folder(folder)
    for old in _paths(folder)[KEPT:]:
        _remove(old)
    return path


def load(path: Path) -> Checkpoint:
    """A checkpoint as it was saved.

    Raises:
        CheckpointError: a file is missing, cut short, changed, or from another checkpoint.
    """
    digests = _manifest(path)
    content = {}
    for name, digest in digests.items():
        try:
            content[name] = (path / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: {name} cannot be read ({error.strerror})") from error
        if _sha256(content[name]) != digest:
            raise CheckpointError(
                f"{path}: {name} is damaged, or from another checkpoint (checksum differs)"
            )
    weights, metadata = files.load(path / WEIGHTS)
    average = files.load(path / AVERAGE)[0] if AVERAGE in digests else None
    try:
        state = torch.load(io.BytesIO(content[STATE]), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises anything for contents that are not its own
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{path}: {STATE} holds what this version cannot read ({error})"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: {STATE} holds a {type(state).__name__}, expected a dict")
    return Checkpoint(path, weights, average, state, metadata)


def exist(folder: Path) -> bool:
    """Whether a run has checkpoints to resume from, good or not."""
    return bool(_paths(folder))


def newest(folder: Path) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """The newest checkpoint of a run that can be loaded, or None, and the errors of newer ones."""
    refused: list[CheckpointError] = []
    for path in _paths(folder):
        try:
            return load(path), refused
        except CheckpointError as error:
            refused.append(error)
    return None, refused


def set_aside(folder: Path, good: Checkpoint | None) -> None:
    """Renames checkpoints newer than `good` (None: all) to *.damaged, and removes incomplete ones,
    which a run leaves if it is killed while writing."""
    for path in _paths(folder):
        if good is not None and path == good.path:
            break
        damaged = path.with_name(f"{path.name}.damaged")
        _remove(damaged)
        path.rename(damaged)
    for partial in _paths(folder, ".partial"):
        _remove(partial)


def _manifest(path: Path) -> dict[str, str]:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        digests = manifest["files"] if manifest["format"] == FORMAT else {}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path}: {MANIFEST} is missing or damaged ({error!r})") from error
    if not isinstance(digests, dict) or not {WEIGHTS, STATE} <= set(digests) <= {
        WEIGHTS, AVERAGE, STATE
    }:  # fmt: skip
        raise CheckpointError(f"{path}: {MANIFEST} is not in the format {FORMAT!r}")
    return digests


def _paths(folder: Path, suffix: str = "") -> list[Path]:
    """Complete checkpoints, newest first, or those of another suffix."""
    steps = {}
    for path in folder.glob(f"step-*{suffix}"):
        step = path.name.removeprefix("step-").removesuffix(suffix)
        if step.isdecimal():
            steps[path] = int(step)
    return sorted(steps, key=steps.__getitem__, reverse=True)


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
