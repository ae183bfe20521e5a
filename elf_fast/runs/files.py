"""Weights and the metadata to rebuild the network, in one safetensors file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic import partial as partial_name
from ..atomic import sync_folder, write
from ..memory import is_out_of_memory

__all__ = ["FORMAT", "CheckpointError", "check_dtypes", "load", "misfit", "previous",
           "remove_partial", "save", "sync_folder", "write"]  # fmt: skip

FORMAT = "elf_fast checkpoint 1"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the reason."""


def save(path: Path, state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Writes `state` and `metadata` (anything that JSON can hold) to `path`, completely or not at
    all. An existing checkpoint is kept as `<name>.previous.safetensors`.
    """
    from safetensors.torch import save as to_bytes

    # Copies, because safetensors refuses tensors that share memory, and two stages may share some.
    state = {
        name: value.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
        for name, value in state.items()
    }
    described = json.dumps(metadata, sort_keys=True)
    header = {"format": FORMAT, "metadata": described, "sha256": _digest(state, described)}
    if path.exists():
        _replace(previous(path), path)
    write(path, to_bytes(state, header))


def remove_partial(folder: Path, names: Sequence[str]) -> None:
    """Removes what a process that was killed in `write` or `save` left of files of these names."""
    own = {kept for name in names for kept in (name, previous(folder / name).name)}
    for path in folder.glob("*.partial"):
        name, _, pid = path.stem.rpartition(".")
        if name in own and pid.isdecimal() and path.is_file():
            path.unlink()


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns (state, metadata) as they were saved.

    Raises:
        CheckpointError: the file is missing, cut short, changed or not a checkpoint of elf_fast.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path}: expected a checkpoint file, found none")
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"{path}: expected a path in UTF-8; safetensors reads no other"
        ) from error
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{path}: expected a complete safetensors file; it is cut short, damaged or of another "
            f"kind ({error})"
        ) from error
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: expected format {FORMAT!r}, got {header.get('format')!r}; only checkpoints "
            "that elf-fast wrote can be read"
        )
    described = header.get("metadata", "")
    if header.get("sha256") != _digest(state, described):
        raise CheckpointError(
            f"{path}: its contents were changed after it was written (checksum differs)"
        )
    try:
        metadata = json.loads(described)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected metadata in JSON ({error})") from error
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: expected metadata with names, got {metadata!r}")
    return state, metadata


def check_dtypes(own: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    """Raises a TypeError for a tensor that `load_state_dict` would convert to another dtype."""
    for name, value in saved.items():
        if name in own and value.dtype != own[name].dtype:
            raise TypeError(f"{name}: expected {own[name].dtype}, got {value.dtype}")


def misfit(error: Exception) -> str:
    """The last line of a `load_state_dict` error, cut to 200 characters: it may list hundreds of
    names."""
    lines = str(error).splitlines() or [repr(error)]
    return textwrap.shorten(lines[-1], 200, placeholder=" ...")


def previous(path: Path) -> Path:
    """Where `save` keeps the checkpoint that it replaces."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def _replace(target: Path, source: Path) -> None:
    partial = partial_name(target)
    try:
        shutil.copyfile(source, partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _digest(state: dict[str, Tensor], described: str) -> str:
    """SHA-256 of the contents. It detects damage, but no attack: an attacker can recompute it."""
    digest = hashlib.sha256(described.encode())
    for name in sorted(state):
        value = state[name]
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
