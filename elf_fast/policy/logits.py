"""Keeps the logits of every exit for every sample: in memory while they are few, then in a file."""

from __future__ import annotations

import tempfile
from math import prod
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

#: Bytes of logits that stay in memory.
MEMORY = 2**29


class LogitStore:
    """Takes batches of logits [E, n, C] and gives all of them as one tensor [E, N, C], float32.

    Args:
        memory: bytes that stay in memory. From then on all logits are in a temporary file without
            a name, which the system removes when the tensor is gone.
        folder: where the file goes; None: the system's folder for temporary files.
    """

    def __init__(self, memory: int = MEMORY, folder: Path | None = None) -> None:
        self._memory, self._folder = memory, folder
        self._held: list[Tensor] = []
        self._bytes = 0
        self._shape: tuple[int, int] | None = None  # E, C
        self._file: IO[bytes] | None = None
        self._rows = 0

    def add(self, logits: Tensor) -> None:
        """Keeps a copy of logits [E, n, C]."""
        # Samples first, so that the file grows at its end.
        rows = logits.detach().transpose(0, 1).to("cpu", torch.float32, copy=True).contiguous()
        self._shape = rows.shape[1], rows.shape[2]
        self._rows += len(rows)
        self._bytes += rows.nbytes
        self._held.append(rows)
        if self._file is None and self._bytes > self._memory:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
        if self._file is not None:
            for held in self._held:
                self._file.write(held.numpy().data)
            self._held.clear()

    def joined(self) -> Tensor | None:
        """[E, N, C], or None if nothing was added."""
        if self._shape is None:
            return None
        if self._file is None:
            return torch.cat(self._held).transpose(0, 1)
        shape = (self._rows, *self._shape)
        if not prod(shape):
            return torch.empty(shape, device="cpu").transpose(0, 1)
        self._file.flush()
        rows = np.memmap(self._file, np.float32, "r+", shape=shape)
        return torch.from_numpy(rows).transpose(0, 1)
