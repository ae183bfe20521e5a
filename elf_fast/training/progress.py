"""The progress of a run, which a checkpoint holds beside weights, optimiser and generators."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..base import ELFOutput
from .processes import Processes


@dataclass
class Totals:
    """Sums over the training samples of an epoch, each counted at the exit where it left."""

    exits: list[int]  # [E] samples
    loss: float = 0.0
    correct: int = 0
    skipped: int = 0  # images that could not be read

    def add(self, out: ELFOutput, targets: Tensor, loss: float) -> None:
        """Adds a batch; `loss` is the sum of the losses of its samples."""
        self.loss += loss
        self.correct += int((out.prediction == targets).sum())
        counts = torch.bincount(out.exit_index, minlength=len(self.exits)).tolist()
        self.exits = [a + b for a, b in zip(self.exits, counts, strict=True)]

    def over(self, processes: Processes) -> Totals:
        """The sums over all processes."""
        values = [self.loss, self.correct, self.skipped, *self.exits]
        loss, *counts = processes.total(torch.tensor(values, dtype=torch.float64)).tolist()
        correct, skipped, *exits = map(int, counts)
        return Totals(exits, loss, correct, skipped)

    def means(self) -> dict[str, Any]:
        n = max(1, sum(self.exits))
        return {
            "loss": self.loss / n,
            "accuracy": self.correct / n,
            "exit_shares": [count / n for count in self.exits],
        }


@dataclass
class Progress:
    """How far a run has come; saved in every checkpoint."""

    totals: Totals
    epoch: int = 0  # finished epochs
    samples: int = 0  # of the current epoch, over all processes, in whole batches
    step: int = 0  # steps of the optimiser
    history: list[dict[str, Any]] = field(default_factory=list)  # one record per finished epoch
