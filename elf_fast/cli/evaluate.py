"""`elf-fast eval`"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from .errors import UserError, check_path, with_flags
from .metrics import show


def add(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "eval",
        help="evaluate a run, the demo or a checkpoint on its test set",
        description="Prints accuracy, exit shares and the share of FLOPs on the test part, or on "
        "validation if there is none. They equal those that the run wrote into metrics.json, or "
        "the demo into results.json.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="RUN",
                        help="folder of a run or of the demo, a run's checkpoint, or a weights "
                        "file")  # fmt: skip
    parser.add_argument(
        "--data-dir",
        metavar="FOLDER",
        help="folder of the images, if they moved or to evaluate on others",
    )
    parser.add_argument("--lists", metavar="FOLDER", help="folder of the lists, if they moved")
    parser.add_argument("--policy", metavar="FILE", help="thresholds and temperatures as "
                        "`elf-fast calibrate` wrote them, or none for those in the weights; by "
                        "default policy.json beside the weights, if it is there")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print all metrics as JSON")
    return parser


def run(arguments: argparse.Namespace) -> int:
    path = arguments.checkpoint
    named = (("RUN", path), ("--data-dir", arguments.data_dir), ("--lists", arguments.lists),
             ("--policy", arguments.policy))  # fmt: skip
    for name, given in named:
        if given is not None:
            check_path(name, given)
    moved = {"data_dir": arguments.data_dir, "lists": arguments.lists}
    overrides = {name: folder for name, folder in moved.items() if folder is not None}
    try:
        evaluated = _evaluate(path, arguments.policy, overrides)
    except (TypeError, ValueError) as error:
        raise UserError(with_flags(str(error), moved)) from error
    if evaluated.checkpoint:
        print(f"{path}: {evaluated.checkpoint}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(evaluated.metrics, indent=1))
    else:
        show(f"{path}: seed {evaluated.seed}, {evaluated.part} set", evaluated.metrics)
        print(f"  {evaluated.thresholds}")
    return 0


class _Evaluated(NamedTuple):
    seed: int
    part: str
    metrics: dict[str, Any]
    thresholds: str  # which, and where they come from
    checkpoint: str = ""  # which, if the weights are not those of a finished run


def _evaluate(path: Path, policy: str | None, overrides: dict[str, str]) -> _Evaluated:
    """Evaluates weights that a run or the demo wrote."""
    from ..policy.artefact import nested, shown_thresholds
    from ..runs import description, opening

    weights, metadata = opening.read(path)
    network = metadata.get("network")
    if network == description.RUN:
        file = Path(policy) if policy not in (None, "none") else None
        if policy is None:
            file = opening.policy_beside(path)
        part, metrics, model = opening.evaluate_run(path, weights, metadata, file, **overrides)
        shown = f"thresholds {shown_thresholds(nested(model.thresholds))}, from "
        thresholds = f"{shown}{file or 'the weights'}"
        checkpoint = metadata.get("checkpoint", "")
        return _Evaluated(metadata["seed"], part, metrics, thresholds, checkpoint)
    if network == description.DEMO:
        from ..demo import run as demo

        given = {**overrides, **({} if policy in (None, "none") else {"policy": policy})}
        if given:
            name, folder = next(iter(given.items()))
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag}: expected none with weights of the demo, got {folder}")
        part, metrics = demo.evaluate_saved(path, weights, metadata)
        shown = shown_thresholds(nested(weights["thresholds"]))
        thresholds = f"thresholds {shown}, from the weights"
        return _Evaluated(metadata["seed"], part, metrics, thresholds)
    raise UserError(
        f"{path}: expected weights of elf-fast train or of the demo, got network {network!r}"
    )
