"""The results of every exit for every sample: all choices of thresholds need one pass only.

Shapes: E exits, N samples, C classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, exit_settings
from ..base import ELFBase, apart_from, writable
from ..criteria import Criterion, Score, find
from ..modes import mode
from ..reference import statistic
from . import logits as stored

#: Logits are read in blocks of so many numbers, because they may lie in a file.
_BLOCK = 2**22


class ExitTable(NamedTuple):
    """The results of E exits for N samples."""

    statistic: Tensor  # [E, N] what the exit test reads
    prediction: Tensor  # [E, N] int64
    target: Tensor  # [N] int64
    criterion: Criterion
    #: [E, N, C] float32, in memory or in a file; None: not kept, so the statistic cannot change.
    logits: Tensor | None = None

    @classmethod
    def from_logits(
        cls,
        logits: Any,
        target: Any,
        *,
        criterion: str | Score | Criterion = "confidence",
        temperatures: float | Sequence[float] | Tensor = 1.0,
    ) -> ExitTable:
        """A table from anyone's own logits, also those of another framework.

        Args:
            logits: [E, N, C], a tensor or an array, such as a `numpy.memmap`; exit E is the
                network's own classifier.
            target: [N] integers, the classes.
            temperatures: one, or [E-1].

        Raises:
            TypeError, ValueError: another shape or dtype, no sample, or a class outside [0, C).
        """
        z = _as_tensor("logits", logits)
        if z.dim() != 3 or not z.is_floating_point() or 0 in z.shape:
            raise ValueError(
                "logits: expected floating [E, N, C] with at least one exit, sample and class, got "
                f"{checks.describe(z)}"
            )
        E, N, C = z.shape
        y = _as_tensor("target", target)
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise TypeError(f"target: expected integers, got {checks.describe(y)}")
        y = y.long()
        checks.target_shape(y, N, y.device)
        checks.target_range(y, C)
        T = exit_settings.temperatures(temperatures, E - 1)
        prediction = _by_block(z, lambda e, rows: rows.argmax(1), torch.int64)
        empty = torch.empty(E, N, device="cpu")
        return cls(empty, prediction, y, find(criterion), z).changed(temperatures=T)

    def changed(
        self,
        *,
        criterion: str | Score | Criterion | None = None,
        temperatures: float | Sequence[float] | Tensor = 1.0,
    ) -> ExitTable:
        """The table of the same logits with another criterion (None: the same) and temperatures.

        Args:
            temperatures: one, or [E-1].

        Raises:
            ValueError: the table holds no logits.
        """
        if self.logits is None:
            raise ValueError("table: expected one that holds logits, got one without")
        rule = self.criterion if criterion is None else find(criterion)
        T = [*exit_settings.temperatures(temperatures, len(self.statistic) - 1).tolist(), 1.0]
        found = _by_block(self.logits, lambda e, z: statistic(z, T[e], rule), torch.float32)
        return self._replace(statistic=found, criterion=rule)

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

    def rows(self, index: Tensor) -> ExitTable:
        """The table of the samples index [n] alone."""
        z = self.logits
        return self._replace(
            statistic=self.statistic[:, index],
            prediction=self.prediction[:, index],
            target=self.target[index],
            logits=None if z is None else z[:, index],
        )

    def digest(self) -> str:
        """SHA-256 of targets and predictions: it tells other data, or the same in another order."""
        digest = hashlib.sha256(str(list(self.prediction.shape)).encode())
        for values in (self.target, self.prediction):
            digest.update(values.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @staticmethod
    def joined(tables: Sequence[ExitTable]) -> ExitTable:
        """One table with the samples of all tables. Logits stay if all tables hold some."""
        kept = [table.logits for table in tables]
        return ExitTable(
            torch.cat([table.statistic for table in tables], 1),
            torch.cat([table.prediction for table in tables], 1),
            torch.cat([table.target for table in tables]),
            tables[0].criterion,
            None
            if any(z is None for z in kept)
            else torch.cat([z for z in kept if z is not None], 1),
        )


def _as_tensor(name: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value, device=checks.device_for(value)).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name}: expected a tensor or an array, got {type(value).__name__}"
        ) from error


def _by_block(z: Tensor, f: Any, dtype: torch.dtype) -> Tensor:
    """f(e, rows [n, C]) -> [n] for all rows of logits [E, N, C], as [E, N]."""
    E, N, C = z.shape
    n = max(1, _BLOCK // C)
    out = torch.empty(E, N, dtype=dtype, device=z.device)
    for start in range(0, N, n):
        for e in range(E):
            out[e, start : start + n] = f(e, z[e, start : start + n])
    return out


def every_exit(model: ELFBase, x: Tensor) -> Iterator[Tensor]:
    """The logits [n, C] of every exit for a batch x [n, ...], also of exits that samples would not
    reach. Read them before the next: the next stage may write into them."""
    given = x
    for e, (stage, head) in enumerate(zip(model.stages, model.heads, strict=True)):
        x = stage(writable(x)) if e else apart_from(given, stage(x))
        yield head(x)


@torch.no_grad()  # inference mode would make tensors in a module's cache useless for training
def exit_table(
    model: ELFBase,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    keep_logits: bool = False,
    memory: int = stored.MEMORY,
    folder: Path | None = None,
) -> ExitTable:
    """Every exit's results for batches of images [n, ...] and targets [n]. Without batches (a
    process may have none) the table has N = 0.

    Args:
        keep_logits: so that temperatures and criterion can change afterwards.
        memory: bytes of logits that stay in memory; more go to a temporary file.
        folder: where that file goes; None: the system's folder for temporary files.
    """
    device = model.thresholds.device
    criterion = find(model.criterion)
    temperatures = [*model.temperatures, 1.0]
    E = len(model.stages)
    empty = torch.empty(E, 0, device="cpu")
    found = [ExitTable(empty, empty.long(), empty[0].long(), criterion)]
    store = stored.LogitStore(memory, folder)
    with mode(model, training=False):
        for x, y in batches:
            statistics, predictions, kept = [], [], []
            logits = every_exit(model, x.to(device, non_blocking=True))
            for z, T in zip(logits, temperatures, strict=True):
                statistics.append(statistic(z, T, criterion))
                predictions.append(z.argmax(1))
                if keep_logits:
                    kept.append(z.float().cpu() if z.device.type != "cpu" else z.float().clone())
            columns = torch.stack(statistics).cpu(), torch.stack(predictions).cpu()
            found.append(ExitTable(*columns, y.cpu(), criterion))
            if keep_logits:
                store.add(torch.stack(kept))
    return ExitTable.joined(found)._replace(logits=store.joined())
