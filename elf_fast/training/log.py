"""Progress display and logs of a training run: rich, TensorBoard, Weights & Biases."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..console import say
from ..flops import Flops
from ..runs.config import TrainConfig
from ..runs.plain import to_dict

#: Without a terminal, a line within an epoch follows the one before it after this many seconds and
#: this share of the epoch, whichever takes longer.
SECONDS, SHARE = 30.0, 0.1


def introduction(
    config: TrainConfig,
    *,
    parameters: int,
    flops: Flops,
    size: int,
    device: torch.device,
    steps: int,
    calibrates: bool,
) -> list[str]:
    """What a run is about to do, in lines.

    Args:
        size: height and width of the images.
        steps: of the optimiser in an epoch.
        calibrates: whether thresholds are chosen after training.
    """
    lines = [
        f"network: {config.model}, {parameters:,} parameters, images {size}x{size}, on {device}"
    ]
    if config.has_exits:
        shares = [flops.leaving_at(e) / flops.without_exits for e in range(len(flops.stages))]
        where = f" after {', '.join(config.exits)} and" if config.exits else ""
        lines.append(
            f"exits: {len(shares)},{where} the last at the end; leaving there costs "
            f"{_joined(shares)}% of the FLOPs without exits"
        )
    lines.append(f"training: {config.epochs:,} epochs of {steps:,} steps")
    if calibrates and config.thresholds != TrainConfig.__dataclass_fields__["thresholds"].default:
        lines.append(
            "--thresholds is only the start: calibration on validation chooses the thresholds "
            "after training; --no-calibrate keeps them"
        )
    return lines


class Log:
    """Shows the current epoch as a progress bar, or without a terminal as a line now and then, and
    every finished epoch as a line.

    Args:
        purge_step: the next step; TensorBoard drops what an interrupted run wrote from it on.
        active: whether to show and write anything; True in the first process only.
        clock: the time in seconds.
    """

    def __init__(
        self,
        config: TrainConfig,
        console: Console,
        *,
        batches_per_epoch: int,
        purge_step: int = 0,
        active: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console
        self._clock, self._batches = clock, batches_per_epoch
        self._title, self._said = "", (0.0, 0)  # time and batch of the last line
        self.epochs = config.epochs
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[stats]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (active and console.is_terminal),
        )
        self._task = self._progress.add_task("", total=batches_per_epoch, stats="")
        self._board: Any = None
        self._wandb: Any = None
        if active and config.log_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            folder = Path(config.output) / "tensorboard"
            self._board = SummaryWriter(str(folder), purge_step=purge_step)
        if active and config.log_wandb:
            import wandb

            name = Path(config.output).name
            self._wandb = wandb.init(project="elf_fast", name=name, config=to_dict(config))

    def __enter__(self) -> Log:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=1 if error[0] else 0)

    def begin_epoch(self, epoch: int, batch: int) -> None:
        """Shows that an epoch, counted from 0, starts, after `batch` of its batches."""
        title = f"epoch {epoch + 1}/{self.epochs}"
        self._progress.reset(self._task, description=title, completed=batch, stats="")
        self._title, self._said = title, (self._clock(), batch)

    def batch(self, batch: int, stats: dict[str, Any]) -> None:
        """Shows that `batch` batches of the epoch are done."""
        self._progress.update(self._task, completed=batch, stats=describe(stats))
        if self.console.is_terminal or batch == self._batches:
            return
        now, (then, before) = self._clock(), self._said
        if now - then >= SECONDS and batch - before >= SHARE * self._batches:
            self._said = (now, batch)
            say(self.console, f"{self._title}  {batch / self._batches:.0%}  {describe(stats)}")

    def epoch(self, record: dict[str, Any]) -> None:
        """Prints and logs the record of a finished epoch."""
        validation = record.get("validation")
        text = f"epoch {record['epoch']}/{self.epochs}  {describe(record)}"
        if record["skipped"]:
            text += f"  | {record['skipped']:,} images left out"
        if validation:
            text += f"  | validation accuracy {100 * validation['overall']:.1f}%"
        say(self.console, text)
        numbers = dict(_numbers(record))
        if self._board is not None:
            for name, number in numbers.items():
                self._board.add_scalar(name, number, record["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=record["step"])


def describe(stats: dict[str, Any]) -> str:
    """A line with the loss, accuracy and exit shares of training samples, and images per second."""
    text = f"loss {stats['loss']:.3f}  accuracy {100 * stats['accuracy']:.1f}%"
    if len(stats["exit_shares"]) > 1:
        text += f"  exits {_joined(stats['exit_shares'])}%"
    return text + f"  {stats['images_per_second']:,.0f} img/s"


def _joined(shares: Sequence[float]) -> str:
    return "/".join(f"{100 * share:.0f}" for share in shares)


def _numbers(record: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """The numbers of nested dicts and lists, each with its path as its name."""
    found: list[tuple[str, float]] = []
    for key, value in record.items():
        if isinstance(value, dict):
            found += _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, list):
            found += _numbers({str(i): v for i, v in enumerate(value)}, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            found.append((prefix + key, value))
    return found
