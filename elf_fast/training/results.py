"""Evaluates and calibrates a run's network, and writes the file of results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console

from ..console import say
from ..data import DataError, ImageLoader, LabelledImages, Splits
from ..flops import Flops
from ..modules import ELF
from ..policy import one_number
from ..policy.exit_table import ExitTable, exit_table
from ..runs import card, checkpoints, files
from ..runs.config import TrainConfig
from ..runs.description import write_weights
from ..runs.evaluation import autocast, check_read, evaluate, evaluation_loader
from ..runs.plain import to_dict
from .processes import Processes
from .stopping import Stop

RESULTS = "metrics.json"


class Evaluator:
    """Measures a run's network over all processes, and names the unreadable files."""

    def __init__(
        self,
        config: TrainConfig,
        class_counts: list[int],
        flops: Flops,
        processes: Processes,
        console: Console,
        stop: Stop,
    ) -> None:
        self.stop = stop
        self.config, self.class_counts, self.flops = config, class_counts, flops
        self.processes, self.console = processes, console
        self._named: set[str] = set()

    def loader(self, part: LabelledImages | None) -> ImageLoader | None:
        if part is None:
            return None
        return evaluation_loader(self.config, part, self.processes.device)

    def metrics(self, model: ELF, loader: ImageLoader) -> dict[str, Any]:
        """See `runs.evaluation.evaluate`."""
        self.processes.share_buffers(model)
        try:
            batches = self.stop.watched(loader)
            found = evaluate(self.config, model, batches, self.class_counts, self.flops)
        except DataError:  # every process raises it, so a collective here cannot hang
            self.name_skipped(loader)
            raise
        self.name_skipped(loader)
        return found

    def calibrate(self, model: ELF, validation: ImageLoader) -> dict[str, Any]:
        """Chooses the exits' thresholds on validation; returns their accuracy and FLOPs there."""
        self.processes.share_buffers(model)
        with autocast(self.config, self.processes.device):
            own = exit_table(model, self.stop.watched(validation))
        # Only tensors are sent, because a user's criterion need not be picklable.
        answers = self.processes.gather((own.statistic, own.prediction, own.target))
        table = ExitTable.joined([ExitTable(s, p, t, own.criterion) for s, p, t in answers])
        try:
            check_read(validation, len(table.target))
        except DataError:
            self.name_skipped(validation)
            raise
        points = one_number.sweep(table, self.flops, thresholds=model.thresholds)
        share = math.inf if self.config.max_flops is None else self.config.max_flops
        chosen = one_number.choose(points, share * self.flops.without_exits)
        one_number.set_threshold(model, chosen.threshold)
        return {
            "threshold": chosen.threshold if math.isfinite(chosen.threshold) else None,
            "accuracy": chosen.accuracy,
            "accuracy_exits_off": points[-1].accuracy,
            "flops_share": chosen.flops / self.flops.without_exits,
        }

    def name_skipped(self, loader: ImageLoader) -> None:
        """Shows the files that any process could not read, each once."""
        if not self.config.skip_errors:
            return
        found = set().union(*self.processes.gather(set(loader.skipped)))
        for path in sorted(found - self._named):
            say(self.console, f"left out, cannot be read: {path}")
        self._named |= found


def write_results(
    model: ELF,
    evaluator: Evaluator,
    splits: Splits,
    *,
    validation: ImageLoader | None,
    history: list[dict[str, Any]],
    metadata: dict[str, Any],
) -> dict[str, Any]:
    """Calibrates on validation, evaluates once on test, and writes weights and results into the
    run's folder. Returns the results."""
    config, is_first = evaluator.config, evaluator.processes.is_first
    output = Path(config.output)
    results: dict[str, Any] = {
        "versions": metadata["versions"],
        "settings": to_dict(config),
        "class_counts": evaluator.class_counts,
        "split": {
            name: None if (part := getattr(splits, name)) is None else len(part)
            for name in ("train", "validation", "test")
        },
    }
    if validation is not None:
        if config.calibrate and len(model.stages) > 1:
            results["calibration"] = evaluator.calibrate(model, validation)
        results["validation"] = evaluator.metrics(model, validation)
    if is_first:
        write_weights(output, model.state_dict(), metadata, checkpoints.WEIGHTS)
    test = evaluator.loader(splits.test)
    if test is not None:
        results["test"] = evaluator.metrics(model, test)
    results["history"] = history
    if is_first:
        described = json.dumps(results, indent=1, allow_nan=False) + "\n"
        files.write(output / RESULTS, described.encode())
        card.write_for_run(output, model, metadata, results, evaluator.flops)
    return results
