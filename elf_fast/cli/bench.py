"""`elf-fast bench`"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..bench import CLASSES, MODEL, SIZE
from .errors import UserError, check_path, with_flags


def add(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "bench",
        help="time a network with exits beside plain PyTorch and the network without them",
        description="Times a trained run, or an untrained network of your choice, with early "
        "exits: inference and, if asked, training steps, beside the plain PyTorch module, the "
        "network without exits, and the oracle: its stages on batches compacted beforehand, which "
        "no early exit can beat. The images are random, so the share that leaves at each exit is "
        "set: for a run it is the share that was measured.",
    )
    parser.add_argument("run_folder", nargs="?", type=Path, metavar="RUN",
                        help="folder of a run, of the demo or of elf_fast.save; in place of "
                        "--model, --exits, --size and --classes")  # fmt: skip
    parser.add_argument("--model", metavar="NAME",
                        help="a network of timm or torchvision, or cifar_resnet32 "
                        f"(default: {MODEL})")  # fmt: skip
    parser.add_argument("--exits", metavar="MODULE,...",
                        help="modules after which to put exits (default: up to three, evenly "
                        "spaced)")  # fmt: skip
    parser.add_argument("--batch", type=int, default=64, metavar="N",
                        help="images in a batch (default: %(default)s)")  # fmt: skip
    parser.add_argument("--size", type=int, metavar="PIXELS",
                        help=f"height and width of the images (default: {SIZE})")  # fmt: skip
    parser.add_argument("--classes", type=int, metavar="C",
                        help=f"number of classes (default: {CLASSES})")  # fmt: skip
    parser.add_argument("--share", type=float, nargs="+", metavar="S",
                        help="for each number one measurement: the share of the samples arriving "
                        "at an exit that goes on, the same at every exit; 1 switches the exits off "
                        "(default: what was measured of a run, else 0.5 0.8 1)")  # fmt: skip
    parser.add_argument("--engine", nargs="+", metavar="ENGINE",
                        choices=["auto", "eager", "inductor"],
                        help="time engines of inference.compile, too, with exits and without: "
                        "eager, inductor (compiles for minutes, once), auto")  # fmt: skip
    parser.add_argument("--training", action="store_true", help="time training steps, too")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S",
                        help="time to spend on each row of the table (default: "
                        "%(default)s)")  # fmt: skip
    parser.add_argument("--device", metavar="DEVICE",
                        help="device to run on (default: cuda if there is one)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    return parser


def run(arguments: argparse.Namespace) -> int:
    from ..bench import command

    try:
        if arguments.run_folder is None:
            command.run(arguments)
        else:
            _bench_run(arguments)
    except (TypeError, ValueError) as error:
        raise UserError(with_flags(str(error), vars(arguments))) from error
    return 0


def _bench_run(arguments: argparse.Namespace) -> None:
    from .. import checks
    from ..bench import command
    from ..runs.loading import load
    from ..runs.measured import exit_shares

    path = arguments.run_folder
    check_path("RUN", path)
    for name in ("model", "exits", "size", "classes"):
        given = getattr(arguments, name)
        if given is not None:
            raise UserError(f"--{name}: expected none with a run, which has its own, got {given}")
    model = load(path, device=checks.device(arguments.device))
    if model.transform is None:
        raise UserError(f"{path}: expected a network saved with transform=, got one without")
    if len(model.stages) == 1:
        raise UserError(f"{path}: expected a network with early exits, got one without")
    found = exit_shares(path, model)
    shares, source = (None, "") if found is None else found
    if arguments.share is None:
        said = (
            "nothing was measured of this run: the shares are only examples"
            if shares is None
            else f"images leave as measured on {source}; --share sets other shares"
        )
        print(said, file=sys.stderr)
    arguments.model = str(path)
    command.run(arguments, command.Trained(model, model.transform.shape, shares))
