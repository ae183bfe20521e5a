"""`elf-fast eval`"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import prior
from .errors import UserError, check_path, with_flags
from .metrics import show

if TYPE_CHECKING:
    from ..page.evaluated import Evaluated
    from ..runs.opening import Evaluation

#: Images that enter together when a report measures milliseconds, unless --batch says otherwise.
_BATCH = 32


def add(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "eval",
        help="evaluate a run, the demo or a checkpoint on its test set",
        description="Prints accuracy, F1, calibration, exit shares and the share of FLOPs on the "
        "test part, or on validation if there is none. With the thresholds that training chose "
        "they equal the run's metrics.json, or the demo's results.json. docs/evaluation.md has "
        "their formulas.",
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
    parser.add_argument("--report", type=Path, metavar="FILE",
                        help="write a page (HTML) with plots and examples")  # fmt: skip
    parser.add_argument("--batch", type=_positive, metavar="N",
                        help="images that enter together when the report measures milliseconds "
                        f"(default: {_BATCH})")  # fmt: skip
    parser.add_argument("--compare", type=Path, nargs="+", default=[], metavar="RUN",
                        help="other runs on the same classes, to show beside this one")  # fmt: skip
    parser.add_argument(
        prior.FLAG,
        metavar="PRIOR",
        help="weigh the classes as they will occur: uniform, training, or a file of lines "
        "class,weight",
    )
    parser.add_argument("--policy", metavar="FILE", help="thresholds and temperatures as "
                        "`elf-fast calibrate` wrote them, or none for those in the weights; by "
                        "default policy.json beside the weights, if it is there")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print all metrics as JSON")
    return parser


def run(arguments: argparse.Namespace) -> int:
    paths = [arguments.checkpoint, *arguments.compare]
    named = [("RUN", arguments.checkpoint), *(("--compare", path) for path in arguments.compare)]
    named += [("--data-dir", arguments.data_dir), ("--lists", arguments.lists),
              ("--policy", arguments.policy)]  # fmt: skip
    for name, given in named:
        if given is not None:
            check_path(name, given)
    if arguments.batch is not None and arguments.report is None:
        raise UserError(f"--batch: expected only with --report, got {arguments.batch}")
    if arguments.report is not None:
        _check_report(arguments.report)
    moved = {"data_dir": arguments.data_dir, "lists": arguments.lists}
    overrides = {name: folder for name, folder in moved.items() if folder is not None}
    batch = None if arguments.report is None else arguments.batch or _BATCH
    try:
        # A file is for the first run; the others have the policies beside their weights.
        others = "none" if arguments.policy == "none" else None
        opened = [
            _open(path, others if i else arguments.policy, overrides)
            for i, path in enumerate(paths)
        ]
        first = opened[0]
        for path, other in zip(paths[1:], opened[1:], strict=True):
            _check_same_classes(path, other, first)
        weights = None
        if arguments.test_prior is not None:
            weights = prior.read(arguments.test_prior, first.class_names, first.class_counts)
        runs = _evaluated(paths, opened, weights, batch)
        for one in runs if arguments.compare else ():
            one.check()
        if arguments.report is not None:
            from ..atomic import write
            from ..page import run as page

            command = shlex.join(["elf-fast", *arguments.given])
            # Names of folders may hold bytes that are no UTF-8.
            made = page.html(runs, command).encode(errors="backslashreplace")
            write(arguments.report, made)
    except (TypeError, ValueError) as error:
        raise UserError(with_flags(str(error), moved)) from error
    for path, evaluation in zip(paths, opened, strict=True):
        if evaluation.checkpoint:
            print(f"{path}: {evaluation.checkpoint}", file=sys.stderr)
        elif evaluation.part == "validation" and evaluation.model.policy and not overrides:
            print(
                f"{path}: no test part, so these are images that chose the thresholds; the "
                "accuracy on new ones is a little lower",
                file=sys.stderr,
            )
    _print(runs, first, arguments)
    return 0


def _evaluated(
    paths: list[Path], opened: list[Evaluation], weights: list[float] | None, batch: int | None
) -> list[Evaluated]:
    from ..page.evaluating import evaluate

    return [
        evaluate(str(path), one, prior=weights, batch=batch)
        for path, one in zip(paths, opened, strict=True)
    ]


def _print(runs: list[Evaluated], opened: Evaluation, arguments: argparse.Namespace) -> None:
    from ..policy.artefact import nested, shown_thresholds

    first = runs[0]
    if arguments.json:
        found = [run.observed.metrics for run in runs]
        by_run = {run.name: metrics for run, metrics in zip(runs, found, strict=True)}
        print(json.dumps(by_run if arguments.compare else found[0], indent=1))
    elif arguments.compare:
        from ..page.compare import rows

        shown = [[f"{first.part} set", *(run.name for run in runs)], *rows(runs)]
        widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
        for label, *cells in shown:
            line = [label.ljust(widths[0])]
            line += [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
            print("  ".join(line).rstrip())
    else:
        heading = f"{first.name}: seed {opened.seed}, {first.part} set"
        show(heading, first.observed.metrics, first.class_names)
        thresholds = shown_thresholds(nested(first.thresholds))
        print(f"  thresholds {thresholds}, from {opened.policy or 'the weights'}")
    if arguments.test_prior is not None:
        _say_left_out(first)
    if arguments.report is not None:
        print(f"wrote {arguments.report}", file=sys.stderr if arguments.json else sys.stdout)


def _say_left_out(run: Evaluated) -> None:
    assert run.prior is not None
    per_class = run.observed.metrics["per_class"]
    without = [c for c, accuracy in enumerate(per_class) if accuracy is None]
    if without:
        weight = 100 * float(run.prior[without].sum() / run.prior.sum())
        print(
            f"{prior.FLAG}: {len(without):,} of {len(per_class):,} classes have no images here and "
            f"are left out; they hold {weight:.1f}% of the prior",
            file=sys.stderr,
        )


def _check_report(path: Path) -> None:
    """Fails before the evaluation if the page cannot be written after it."""
    check_path("--report", path)
    if path.is_dir():
        raise UserError(f"--report: expected a file, got the folder {path}")
    if not path.parent.is_dir():
        raise UserError(f"--report: expected a file in a folder that exists, got {path}")


def _open(path: Path, policy: str | None, overrides: dict[str, str]) -> Evaluation:
    """Weights that a run or the demo wrote, and their data.

    Args:
        policy: a file, "none", or None for the one beside the weights, if there is one.
    """
    from ..runs import description, opening

    weights, metadata = opening.read(path)
    network = metadata.get("network")
    if network == description.RUN:
        file = Path(policy) if policy not in (None, "none") else None
        if policy is None:
            file = opening.policy_beside(path)
        return opening.evaluation(path, weights, metadata, file, **overrides)
    if network == description.DEMO:
        from ..demo import run as demo

        given = {**overrides, **({} if policy in (None, "none") else {"policy": policy})}
        if given:
            name, folder = next(iter(given.items()))
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag}: expected none with weights of the demo, got {folder}")
        return demo.evaluation(path, weights, metadata)
    raise UserError(
        f"{path}: expected weights of elf-fast train or of the demo, got network {network!r}"
    )


def _check_same_classes(path: Path, opened: Evaluation, first: Evaluation) -> None:
    if opened.class_names != first.class_names:
        ours, theirs = first.class_names, opened.class_names
        differ = next(
            (pair for pair in zip(ours, theirs, strict=False) if len(set(pair)) > 1), None
        )
        how = "" if differ is None else f", among them {differ[1]} in place of {differ[0]}"
        raise UserError(
            f"--compare: expected runs on the same {len(ours):,} classes in the same order, got "
            f"{path} with {len(theirs):,}{how}"
        )
    if (opened.part, opened.images.targets.tolist()) != (first.part, first.images.targets.tolist()):
        raise UserError(
            f"--compare: expected runs with the same {first.part} images, "
            f"{len(first.images):,}, got {path} with others in its {opened.part} part, "
            f"{len(opened.images):,}; --data-dir names one folder for all"
        )


def _positive(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return value
