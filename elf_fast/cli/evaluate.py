"""`elf-fast eval`"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .errors import UserError, check_path
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
    parser.add_argument("--json", action="store_true", help="print all metrics as JSON")
    return parser


def run(arguments: argparse.Namespace) -> int:
    path = arguments.checkpoint
    named = (("RUN", path), ("--data-dir", arguments.data_dir), ("--lists", arguments.lists))
    for name, given in named:
        if given is not None:
            check_path(name, given)
    moved = {"data_dir": arguments.data_dir, "lists": arguments.lists}
    overrides = {name: folder for name, folder in moved.items() if folder is not None}
    try:
        metadata, part, metrics = _evaluate(path, overrides)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    if arguments.json:
        print(json.dumps(metrics, indent=1))
    else:
        show(f"{path}: seed {metadata['seed']}, {part} set", metrics)
    return 0


def _evaluate(path: Path, overrides: dict[str, str]) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """(metadata, part, metrics) of weights that a run or the demo wrote."""
    from ..runs import description, opening

    weights, metadata = opening.read(path)
    network = metadata.get("network")
    if network == description.RUN:
        return metadata, *opening.evaluate_run(path, weights, metadata, **overrides)
    if network == description.DEMO:
        from ..demo import run as demo

        if overrides:
            name, folder = next(iter(overrides.items()))
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag}: expected none with weights of the demo, got {folder}")
        return metadata, *demo.evaluate_saved(path, weights, metadata)
    raise UserError(
        f"{path}: expected weights of elf-fast train or of the demo, got network {network!r}"
    )
