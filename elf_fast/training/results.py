"""Evaluates and calibrates a run's network, and writes the file of results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console

from .. import digests
from ..console import say
from ..data import DataError, ImageLoader, LabelledImages, Splits
from ..flops import Flops
from ..groups import class_groups
from ..modules import ELF
from ..policy import Policy, Promise, one_number
from ..policy.artefact import FILE, nested
from ..policy.costs import flops_shares
from ..policy.exit_table import ExitTable, exit_table
from ..policy.measure import measured
from ..runs import card, checkpoints, contents, files
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

    def calibrate(
        self, model: ELF, validation: ImageLoader, data_digest: str
    ) -> tuple[dict[str, Any], Policy]:
        """Chooses the exits' thresholds on validation. Returns their accuracy and FLOPs there, and
        the same as a policy."""
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
        chosen = one_number.choose(points, self._limit(points))
        one_number.set_threshold(model, chosen.threshold)
        share = chosen.flops / self.flops.without_exits
        policy = self._policy(model, table, data_digest)
        say(
            self.console,
            f"thresholds {policy.shown_thresholds()}: {policy.promise.sentence()} on "
            f"{len(table.target):,} validation images ({100 * chosen.accuracy:.1f}% right, exits "
            f"off {100 * points[-1].accuracy:.1f}%, {100 * share:.1f}% of the FLOPs)",
        )
        found = {
            "threshold": chosen.threshold if math.isfinite(chosen.threshold) else None,
            "accuracy": chosen.accuracy,
            "accuracy_exits_off": points[-1].accuracy,
            "flops_share": share,
        }
        return found, policy

    def _limit(self, points: list[one_number.OperatingPoint]) -> float:
        """The most FLOPs per sample. It is raised, and said so, if a finished training could
        otherwise not be used: where samples without a finite confidence cannot leave early."""
        if self.config.max_flops is None:
            return math.inf
        full, least = self.flops.without_exits, min(p.flops for p in points)
        limit = self.config.max_flops * full
        if limit < least:
            say(self.console, f"max_flops: no threshold costs at most {self.config.max_flops:g} of "
                f"the FLOPs; the cheapest costs {least / full:.3f}")  # fmt: skip
        return max(limit, least)

    def _policy(self, model: ELF, table: ExitTable, data_digest: str) -> Policy:
        thresholds = model.thresholds.cpu()
        limit = self.config.max_flops
        return Policy(
            criterion=model.criterion,
            thresholds=nested(thresholds),
            temperatures=tuple(model.temperatures.tolist()),
            promise=Promise("accuracy" if limit is None else "max_flops", limit),
            measured=measured(
                table, thresholds, flops_shares(self.flops), groups=class_groups(self.class_counts)
            ),
            data_digest=data_digest,
            weights_digest=digests.of_weights(model.state_dict()),
        )

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
    """Calibrates on validation, evaluates once on test, and writes weights, policy and results into
    the run's folder. Returns the results."""
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
    policy: Policy | None = None
    if validation is not None:
        if config.calibrate and len(model.stages) > 1:
            digest = contents.fingerprint(metadata["data"]["validation"])
            results["calibration"], policy = evaluator.calibrate(model, validation, digest)
        results["validation"] = evaluator.metrics(model, validation)
    if is_first:
        file = output / FILE
        if file.exists():  # first, so that no policy of earlier weights lies beside new ones
            file.replace(files.previous(file))
            say(
                evaluator.console,
                f"{file} is written anew; the one before is {files.previous(file).name}",
            )
        write_weights(output, model.state_dict(), metadata, checkpoints.WEIGHTS)
        if policy is not None and isinstance(policy.criterion, str):
            policy.save(file)
    test = evaluator.loader(splits.test)
    if test is not None:
        results["test"] = evaluator.metrics(model, test)
    results["history"] = history
    if is_first:
        described = json.dumps(results, indent=1, allow_nan=False) + "\n"
        files.write(output / RESULTS, described.encode())
        card.write_for_run(output, model, metadata, results, evaluator.flops)
    return results
