"""Evaluating a network and noting what every exit says about every sample, also where the sample
does not reach the exit."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..criteria import find
from ..modes import mode
from ..modules import ELF
from ..policy.exit_table import ExitTable, every_exit
from ..reference import statistic

if TYPE_CHECKING:
    from ..metrics import ELFMetrics


class EarlyWrong(NamedTuple):
    """A sample that left before the last exit with a wrong prediction."""

    probability: float  # of the prediction
    sample: int  # its number among those that were read
    image: Tensor  # as the network saw it
    target: int
    prediction: int
    exit_index: int
    final_prediction: int  # of the last exit


class Observed(NamedTuple):
    """What an evaluation saw. Shapes: E exits, N samples."""

    metrics: dict[str, Any]  # of `ELFMetrics`, and anytime_accuracy and anytime_ece
    table: ExitTable  # all exits, also those that a sample did not reach
    probability: Tensor  # [E, N] float32 of each exit's prediction, at its temperature
    exit_index: Tensor  # [N] int64 the exit that was taken
    early_wrong: list[EarlyWrong]  # the surest, from the surest
    images: Tensor  # [k, ...] of the samples that the caller chose


@torch.no_grad()
def observe(
    model: ELF,
    batches: Iterable[tuple[Tensor, Tensor]],
    metrics: ELFMetrics,
    *,
    wrong: int = 0,
    images: Collection[int] = (),
) -> Observed:
    """Evaluates, and runs every sample through all exits, too. Costs at most twice as much as the
    whole network.

    Args:
        metrics: without samples; they hold the temperatures.
        wrong: how many of the samples that left early and wrong are kept.
        images: numbers of the samples whose images are kept, in the order of the batches.

    The result's metrics also hold, with all samples at every exit as if everyone left there:
        anytime_accuracy [E]: accuracy. With a prior in `metrics`, weighted by it.
        anytime_ece [E]: expected calibration error.
    """
    from ..metrics import calibration_error  # here, because torchmetrics imports matplotlib

    device = model.thresholds.device
    criterion = find(model.criterion)
    settings = [*model.temperatures, torch.ones((), device=device)]
    E = len(model.stages)
    empty = torch.empty(E, 0, device="cpu")
    columns = [[empty], [empty.long()], [empty], [empty[0].long()], [empty[0].long()]]
    surest: list[EarlyWrong] = []
    chosen: list[Tensor] = []
    seen = 0
    with mode(model, training=False):
        for x, y in batches:
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            out = model(x)
            metrics.update(out, y)
            statistics, predictions, probabilities = [], [], []
            parts = zip(every_exit(model, x), settings, metrics.temperature, strict=True)
            for z, T, T_of_probability in parts:
                statistics.append(statistic(z, T, criterion).float())
                predictions.append(z.argmax(1))
                probabilities.append(statistic(z, T_of_probability).float())
            stacked = map(torch.stack, (statistics, predictions, probabilities))
            found = [values.cpu() for values in (*stacked, out.exit_index, y)]
            for column, values in zip(columns, found, strict=True):
                column.append(values)
            if wrong:
                surest += _early_wrong(x, *found[1:], first=seen)
                surest = sorted(surest, key=lambda w: -w.probability)[:wrong]
            chosen += [x[i - seen].cpu() for i in images if seen <= i < seen + len(x)]
            seen += len(x)
    s, prediction, probability, exit_index, target = (torch.cat(column, -1) for column in columns)
    table = ExitTable(s, prediction, target, criterion)
    metrics_of_all = {
        **metrics.compute(),
        "anytime_accuracy": metrics.accuracies(table.correct, table.target),
        "anytime_ece": [
            calibration_error(p, right) for p, right in zip(probability, table.correct, strict=True)
        ],
    }
    kept = torch.stack(chosen) if chosen else torch.empty(0, device="cpu")
    return Observed(metrics_of_all, table, probability, exit_index, surest, kept)


def _early_wrong(
    x: Tensor,
    prediction: Tensor,
    probability: Tensor,
    exit_index: Tensor,
    target: Tensor,
    *,
    first: int,
) -> list[EarlyWrong]:
    rows = torch.arange(len(target))
    taken = prediction[exit_index, rows]
    sure = probability[exit_index, rows]
    is_wrong = (exit_index < len(prediction) - 1) & (taken != target) & ~sure.isnan()
    return [
        EarlyWrong(
            sure[i].item(), first + i, x[i].cpu(), int(target[i]), int(taken[i]),
            int(exit_index[i]), int(prediction[-1, i]),
        )
        for i in is_wrong.nonzero().flatten().tolist()
    ]  # fmt: skip
