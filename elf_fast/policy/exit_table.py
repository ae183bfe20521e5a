"""The results of every exit for every sample: a sweep over thresholds runs the network once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..base import ELFBase, apart_from, writable
from ..criteria import Criterion, find
from ..modes import mode
from ..reference import statistic


class ExitTable(NamedTuple):
    """The results of E exits for N samples."""

    statistic: Tensor  # [E, N] what the exit test reads
    prediction: Tensor  # [E, N] int64
    target: Tensor  # [N] int64
    criterion: Criterion

    @property
    def correct(self) -> Tensor:
        """[E, N] bool."""
        return self.prediction == self.target

    def exit_index(self, thresholds: Tensor) -> Tensor:
        """[N] the exit that each sample takes at thresholds [E-1] or [E-1, C]."""
        last = len(self.statistic) - 1
        t = thresholds.to(self.statistic)
        t = t.gather(1, self.prediction[:-1]) if t.dim() == 2 else t[:, None]
        leaves = torch.ones_like(self.prediction, dtype=torch.bool)
        leaves[:last] = self.criterion.passes(self.statistic[:-1], t)
        return leaves.int().argmax(0)

    @staticmethod
    def joined(tables: Sequence[ExitTable]) -> ExitTable:
        """One table with the samples of all tables."""
        return ExitTable(
            torch.cat([table.statistic for table in tables], 1),
            torch.cat([table.prediction for table in tables], 1),
            torch.cat([table.target for table in tables]),
            tables[0].criterion,
        )


def every_exit(model: ELFBase, x: Tensor) -> Iterator[Tensor]:
    """The logits [n, C] of every exit for a batch x [n, ...], also of exits that samples would not
    reach. Read them before the next: the next stage may write into them."""
    given = x
    for e, (stage, head) in enumerate(zip(model.stages, model.heads, strict=True)):
        x = stage(writable(x)) if e else apart_from(given, stage(x))
        yield head(x)


@torch.no_grad()  # inference mode would make tensors in a module's cache useless for training
def exit_table(model: ELFBase, batches: Iterable[tuple[Tensor, Tensor]]) -> ExitTable:
    """Every exit's results for batches of images [n, ...] and targets [n]. Without batches (a
    process may have none) the table has N = 0."""
    device = model.thresholds.device
    criterion = find(model.criterion)
    temperatures = [*model.temperatures, 1.0]
    E = len(model.stages)
    empty = torch.empty(E, 0, device="cpu")
    found = [ExitTable(empty, empty.long(), empty[0].long(), criterion)]
    with mode(model, training=False):
        for x, y in batches:
            statistics, predictions = [], []
            logits = every_exit(model, x.to(device, non_blocking=True))
            for z, T in zip(logits, temperatures, strict=True):
                statistics.append(statistic(z, T, criterion))
                predictions.append(z.argmax(1))
            columns = torch.stack(statistics).cpu(), torch.stack(predictions).cpu()
            found.append(ExitTable(*columns, y.cpu(), criterion))
    return ExitTable.joined(found)
