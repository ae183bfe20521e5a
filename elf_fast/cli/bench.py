"""`elf-fast bench`"""

from __future__ import annotations

import argparse
from typing import Any

from .errors import UserError, with_flags


def add(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "bench",
        help="time a network with exits beside plain PyTorch and the network without them",
        description="Times a network of your choice, untrained, with early exits: inference and, "
        "if asked, training steps, beside the plain PyTorch module, the network without exits, and "
        "the oracle: its stages on batches compacted beforehand, which no early exit can beat.",
    )
    parser.add_argument("--model", default="torchvision/resnet18", metavar="NAME",
                        help="a network of timm or torchvision, or cifar_resnet32 "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--exits", metavar="MODULE,...",
                        help="modules after which to put exits (default: up to three, evenly "
                        "spaced)")  # fmt: skip
    parser.add_argument("--batch", type=int, default=64, metavar="N",
                        help="images in a batch (default: %(default)s)")  # fmt: skip
    parser.add_argument("--size", type=int, default=224, metavar="PIXELS",
                        help="height and width of the images (default: %(default)s)")  # fmt: skip
    parser.add_argument("--classes", type=int, default=1000, metavar="C",
                        help="number of classes (default: %(default)s)")  # fmt: skip
    parser.add_argument("--share", type=float, nargs="+", default=[0.5, 0.8, 1.0], metavar="S",
                        help="shares of the samples that go on after each exit; 1 switches the "
                        "exits off (default: 0.5 0.8 1)")  # fmt: skip
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
        command.run(arguments)
    except ValueError as error:
        raise UserError(with_flags(str(error), vars(arguments))) from error
    return 0
