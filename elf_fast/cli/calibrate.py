"""`elf-fast calibrate`"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError, check_path, with_flags

if TYPE_CHECKING:
    from ..policy import Measured, Policy

_PATHS = ("data_dir", "lists", "output")
#: Flags that are arguments of `policy.calibrate`.
_OPTIONS = (
    "max_flops", "max_ms", "max_drop", "exit_shares", "guarantee", "few_drop", "per", "criterion",
)  # fmt: skip


def add(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "calibrate",
        help="choose the thresholds of a run for a budget, with a guarantee if you like",
        description="Chooses thresholds and temperatures in one pass over the validation part of a "
        "run, and writes them into policy.json beside the weights, which stay as they are. "
        "Without a limit: the most accurate thresholds. docs/policy.md says which option when.",
    )
    parser.add_argument(
        "run_path",
        type=Path,
        metavar="RUN",
        help="folder of a run, a run's checkpoint, or a weights file",
    )
    limits = parser.add_argument_group("limits, at most one")
    limits.add_argument(
        "--max-flops",
        type=float,
        metavar="X",
        help="largest share of the FLOPs of the network without exits",
    )
    limits.add_argument(
        "--max-ms",
        type=float,
        metavar="X",
        help="largest mean time of a batch in milliseconds, as measured here",
    )
    limits.add_argument(
        "--max-drop",
        type=float,
        metavar="X",
        help="largest drop in accuracy against exits off; 0.01 is one point",
    )
    limits.add_argument(
        "--exit-shares",
        type=float,
        nargs="+",
        metavar="X",
        help="share of the images that leave at each exit, the last included",
    )
    more = parser.add_argument_group("choices")
    more.add_argument(
        "--guarantee",
        type=float,
        metavar="P",
        help="the drops hold on new data of the same kind with this probability",
    )
    more.add_argument(
        "--few-drop",
        type=float,
        metavar="X",
        help="beside --max-drop, largest drop of classes with few images",
    )
    more.add_argument(
        "--per",
        choices=("exit", "class", "group"),
        default="exit",
        help="what has a threshold of its own at each exit (default: %(default)s)",
    )
    more.add_argument(
        "--criterion",
        nargs="+",
        metavar="NAME",
        help="criteria to choose from, or auto for all; the run's if not given",
    )
    more.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="images per batch of --max-ms (default: 1)",
    )
    more.add_argument("--device", metavar="NAME", help="the run's, or what this machine has")
    more.add_argument("--data-dir", metavar="FOLDER", help="folder of the images, if they moved")
    more.add_argument("--lists", metavar="FOLDER", help="folder of the lists, if they moved")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="the policy's file; policy.json beside the weights if not given",
    )
    parser.add_argument("--json", action="store_true", help="print the policy as JSON")
    return parser


def run(arguments: argparse.Namespace) -> int:
    from ..data import DataError

    path: Path = arguments.run_path
    check_path("RUN", path)
    for name in _PATHS:
        given = getattr(arguments, name)
        if given is not None:
            check_path(f"--{name.replace('_', '-')}", given)
    if arguments.max_ms is None and arguments.batch is not None:
        raise UserError(f"--batch: expected only with --max-ms, got {arguments.batch}")
    output = _output(path) if arguments.output is None else Path(arguments.output)
    if not output.parent.is_dir():
        raise UserError(f"--output: expected a file in a folder that exists, got {output}")
    try:
        before, policy = _calibrate(path, arguments)
    except (TypeError, ValueError, DataError) as error:
        raise UserError(with_flags(str(error), vars(arguments))) from error
    policy.save(output)
    if arguments.output is None and path.is_dir():
        _write_card(path, policy)
    if arguments.json:
        print(output.read_text(encoding="utf-8"), end="")
    else:
        _show(path, output, before, policy)
    return 0


def _calibrate(path: Path, arguments: argparse.Namespace) -> tuple[Measured, Policy]:
    from ..runs import description, opening

    weights, metadata = opening.read(path)
    if metadata.get("network") != description.RUN:
        raise UserError(
            f"{path}: expected weights of elf-fast train, got network {metadata.get('network')!r}"
        )
    options = {name: getattr(arguments, name) for name in _OPTIONS}
    if options["criterion"] == ["auto"]:
        options["criterion"] = "auto"
    named = {name: getattr(arguments, name) for name in ("data_dir", "lists", "device")}
    return opening.calibrate_run(
        path,
        weights,
        metadata,
        batch=1 if arguments.batch is None else arguments.batch,
        options={name: value for name, value in options.items() if value is not None},
        **{name: value for name, value in named.items() if value is not None},
    )


def _output(path: Path) -> Path:
    """The file of the policy beside the weights, which belongs to these weights alone."""
    from ..policy import FILE
    from ..runs import checkpoints

    folder = path if path.is_dir() else path.parent
    is_average_elsewhere = (folder / checkpoints.AVERAGE).exists()
    if not path.is_dir() and (path.name != checkpoints.WEIGHTS or is_average_elsewhere):
        raise UserError(f"--output: expected a file for the policy of {path}, got none")
    return folder / FILE


def _write_card(folder: Path, policy: Policy) -> None:
    """Writes the run's model card anew, with the policy and what it gave on validation. A README.md
    of the user's own stays."""
    from ..runs import card, opening
    from ..runs.description import facts
    from ..runs.loading import load

    if not (folder / card.NAME).exists():
        return
    _, metadata = opening.read(folder)
    model, known = load(folder), facts(folder, metadata)
    results = {"validation": card.metrics_of(policy)}
    flops = card.flops_of(model, metadata, known)
    name = folder.resolve().name
    card.write(folder, card.text(name, model, metadata, known, results, policy, flops))


def _show(path: Path, output: Path, before: Measured, policy: Policy) -> None:
    after = policy.measured
    print(f"{path}: {before.samples:,} validation images")
    print(f"  {'':26}{'in weights':>12}{'chosen':>10}{'exits off':>12}")
    off = after.accuracy_exits_off.value
    print(_row("accuracy, %", before.accuracy.value, after.accuracy.value, off))
    print(_row("FLOPs, % of without exits", before.flops_share, after.flops_share, 1.0))
    for name in after.groups:
        was = before.groups[name].accuracy.value
        now, last = after.groups[name].accuracy, after.groups[name].accuracy_exits_off
        print(_row(f"accuracy {name}, %", was, now.value, last.value)
              + f"  of {after.groups[name].samples:,} images")  # fmt: skip
    for e, exits in enumerate(zip(before.exits, after.exits, strict=True), start=1):
        print(_row(f"left at exit {e}, %", *(x.share.value for x in exits)))
        there = [None if x.accuracy is None else x.accuracy.value for x in exits]
        print(_row(f"accuracy at exit {e}, %", *there))
    if after.ms is not None:
        print(f"  {'ms per batch':26}{'':>12}{after.ms:>10.2f}")
    for tried in policy.tried:
        is_ms = policy.promise.aim == "max_ms"
        cost = f"{tried.cost:.3g} ms" if is_ms else f"{100 * tried.cost:.1f}% of the FLOPs"
        print(f"  by {tried.criterion}: {100 * tried.accuracy:.1f}% right at {cost}")
    if policy.promise.guarantee is not None:
        print(f"  column chosen: on the {after.samples:,} images that tested the guarantee")
    print(f"  criterion {policy.criterion}, thresholds {policy.shown_thresholds()}, temperatures "
          + " / ".join(f"{T:.3g}" for T in policy.temperatures))  # fmt: skip
    print(f"  chosen: {_promise(policy)}")
    print(f"  written: {output}")


def _promise(policy: Policy) -> str:
    sentence = policy.promise.sentence()
    if policy.promise.guarantee is not None and policy.is_off:
        return f"exits off, because no thresholds could be certified so that {sentence}"
    return sentence


def _row(label: str, *shares: float | None) -> str:
    widths = (12, 10, 12)
    cells = ("none" if x is None else f"{100 * x:.1f}" for x in shares)
    return f"  {label:26}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=False))
