"""`elf-fast demo`"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .errors import UserError, check_path


def add(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "demo",
        help="train ELF and the same network without exits on long-tailed digits; write a report",
        description="Trains a small network without exits and with them (ELF) on scikit-learn's "
        "digits made long-tailed, chooses thresholds on validation, compares accuracy, FLOPs and "
        "speed on the test set, and writes report.html, results.json and model.safetensors. Takes "
        "about two minutes on two CPU cores.",
    )
    parser.add_argument("--output", type=Path, default=Path("demo"), metavar="FOLDER",
                        help="where to write (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seeds", type=_positive, default=3, metavar="N",
                        help="how often to train each network (default: %(default)s)")  # fmt: skip
    parser.add_argument("--epochs", type=_positive, default=40, metavar="N",
                        help="passes over the training data (default: %(default)s)")  # fmt: skip
    return parser


def run(arguments: argparse.Namespace) -> int:
    check_path("--output", arguments.output)
    if arguments.output.exists() and not arguments.output.is_dir():
        raise UserError(f"--output: expected a folder, got the file {arguments.output}")
    from ..demo import run as demo

    demo.run(arguments.output, seeds=arguments.seeds, epochs=arguments.epochs)
    return 0


def _positive(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return value
