"""`elf-fast predict`"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError, check_path, with_flags

if TYPE_CHECKING:
    from ..modules import ELF
    from ..runs.predict import Guess, Prediction

    Write = Callable[[Prediction], None]

#: So many images are loaded in the process itself: to start others takes longer.
_FEW = 64


def add(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "predict",
        help="classify images by a run or a saved network",
        description="Classifies images by a trained network: class, confidence and the exit that "
        "each image took, in the order of the images. The network, its preprocessing (photos are "
        "turned as their EXIF orientation says, if they were in training) and its thresholds are "
        "those that the run recorded; a policy.json beside the weights sets the thresholds.",
        epilog="Images that cannot be read are named and counted on stderr and left out; the "
        "status is then still 0, and 2 if no image could be read.",
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN",
                        help="folder of a run, of the demo or of elf_fast.save, a run's "
                        "checkpoint, or a weights file")  # fmt: skip
    parser.add_argument("inputs", nargs="+", metavar="FILE|FOLDER|LIST",
                        help="an image; a folder, whose images are found at any depth; a .txt file "
                        "with one path per line, relative to it; or - for such lines on "
                        "stdin")  # fmt: skip
    parser.add_argument("--csv", metavar="FILE",
                        help="write a table to FILE in place of lines on stdout; FILE appears when "
                        "it is complete")  # fmt: skip
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per line and image"
    )
    parser.add_argument("--top-k", type=int, default=1, metavar="K",
                        help="how many classes to show, the most probable first (default: "
                        "%(default)s)")  # fmt: skip
    parser.add_argument("--exit-probabilities", action="store_true",
                        help="show the most probable class at every exit, also at those that did "
                        "not run; slower: up to twice the time of the network without "
                        "exits")  # fmt: skip
    parser.add_argument("--device", metavar="DEVICE",
                        help="device to run on (default: cuda if there is one)")  # fmt: skip
    parser.add_argument("--batch", type=int, default=64, metavar="N",
                        help="images in a batch (default: %(default)s)")  # fmt: skip
    parser.add_argument("--workers", type=int, metavar="N",
                        help="processes that load images (default: up to 4, and none for few "
                        "images)")  # fmt: skip
    return parser


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    from .. import checks
    from ..data import image_paths
    from ..runs.loading import load
    from ..runs.predict import predict

    try:
        device = checks.device(arguments.device)
        model = load(arguments.run_folder, device=device)
        paths, left_out = image_paths(arguments.inputs)
    except (TypeError, ValueError) as error:
        raise UserError(with_flags(str(error), vars(arguments))) from error
    for text in [_rule(model), *(f"left out in {text}" for text in left_out)]:
        _say(text)
    workers = arguments.workers
    if workers is None:
        workers = 0 if len(paths) <= _FEW else min(4, os.cpu_count() or 1)
    E = len(model.stages)
    left, unreadable = [0] * E, 0
    with contextlib.ExitStack() as stack:
        advance, say = stack.enter_context(_progress(len(paths), arguments))
        write = stack.enter_context(_writer(arguments, model, paths))

        def name(message: str) -> None:
            nonlocal unreadable
            unreadable += 1
            advance()
            say(f"left out: {message}")

        try:
            found = predict(
                model,
                paths,
                batch_size=arguments.batch,
                workers=workers,
                top_k=arguments.top_k,
                exit_probabilities=arguments.exit_probabilities,
                on_unreadable=name,
            )
        except (TypeError, ValueError) as error:
            raise UserError(with_flags(str(error), vars(arguments))) from error
        for prediction in found:
            write(prediction)
            left[prediction.exit_index] += 1
            advance()
        if unreadable == len(paths):
            raise UserError(f"expected images that can be read, got {unreadable:,} that cannot")
    read = len(paths) - unreadable
    shares = " / ".join(f"{100 * n / read:.1f}" for n in left)
    _say(f"images: {read:,}, cannot be read: {unreadable:,}; left at each exit, %: {shares}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    for flag, path in (
        ("RUN", arguments.run_folder),
        ("--csv", arguments.csv or ""),
        *(("FILE|FOLDER|LIST", path) for path in arguments.inputs),
    ):
        check_path(flag, path)
    limits = (
        ("--top-k", arguments.top_k, 1),
        ("--batch", arguments.batch, 1),
        ("--workers", arguments.workers or 0, 0),
    )
    for flag, number, least in limits:
        if not least <= number <= 2**20:
            raise UserError(f"{flag}: expected an integer of {least} to {2**20:,}, got {number}")
    if arguments.csv is None:
        return
    is_other = os.path.exists(arguments.csv) and not os.path.isfile(arguments.csv)
    if is_other or not os.path.isdir(os.path.dirname(arguments.csv) or "."):
        raise UserError(f"--csv: expected a file in a folder that exists, got {arguments.csv}")


def _say(text: str) -> None:
    from ..checks import printable

    print(printable(text), file=sys.stderr)


def _rule(model: ELF) -> str:
    """By what images leave early, in words."""
    from .. import criteria

    if len(model.stages) == 1:
        return "the network has no early exits"
    rows = model.thresholds.tolist()
    shown = ", ".join(
        f"{min(t):.3g} to {max(t):.3g}" if isinstance(t, list) else f"{t:.3g}" for t in rows
    )
    source = "the thresholds in the weights" if model.policy is None else "policy.json"
    return f"exits by {source}: {criteria.find(model.criterion).name} {shown}"


@contextlib.contextmanager
def _writer(arguments: argparse.Namespace, model: ELF, paths: list[str]) -> Iterator[Write]:
    """Where predictions go: a CSV file, JSON lines, both, or lines for people."""
    writes: list[Write] = []
    with contextlib.ExitStack() as stack:
        if arguments.csv is not None:
            k = min(arguments.top_k, len(model.class_names))
            exits = len(model.stages) if arguments.exit_probabilities else 0
            writes.append(
                stack.enter_context(_csv_file(Path(os.path.realpath(arguments.csv)), k, exits))
            )
        if arguments.json:
            writes.append(lambda found: print(_json(found)))
        if not writes:
            width = min(60, max((len(path) for path in paths), default=0))
            longest = min(40, max(map(len, model.class_names)))
            writes.append(lambda found: print(_line(found, width, longest, len(model.stages))))

        def write(found: Prediction) -> None:
            for each in writes:
                each(found)

        yield write


@contextlib.contextmanager
def _csv_file(path: Path, k: int, exits: int) -> Iterator[Write]:
    from ..atomic import writing

    heading = ["path", "class", "class_index", "confidence", "exit_index"]
    heading += [f"top{i}_{kind}" for i in range(2, k + 1) for kind in ("class", "probability")]
    heading += [f"exit{e}_{kind}" for e in range(exits) for kind in ("class", "probability")]
    with writing(path) as file:
        # A name of a file may hold any bytes; they are written as they are.
        lines = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="")
        table = csv.writer(lines)
        table.writerow(heading)

        def write(found: Prediction) -> None:
            cells: list[Any] = [found.path, found.class_name, found.prediction, found.confidence]
            cells.append(found.exit_index)
            for guess in (*found.top[1:], *found.exits):
                cells += [guess.class_name, guess.probability]
            table.writerow(cells)

        yield write
        lines.flush()
        lines.detach()


def _json(found: Prediction) -> str:
    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    def guess(of: Guess) -> dict[str, Any]:
        return {
            "class": of.class_name,
            "class_index": of.class_index,
            "probability": number(of.probability),
        }

    content: dict[str, Any] = {
        "path": found.path,
        "class": found.class_name,
        "class_index": found.prediction,
        "confidence": number(found.confidence),
        "exit_index": found.exit_index,
        "top": list(map(guess, found.top)),
    }
    if found.exits:
        content["exits"] = list(map(guess, found.exits))
    return json.dumps(content)


def _line(found: Prediction, width: int, longest: int, exits: int) -> str:
    from ..checks import printable

    path, name = printable(found.path), printable(found.class_name)
    text = (
        f"{path:{width}}  {name:{longest}}  {found.confidence:6.1%}  "
        f"exit {found.exit_index + 1} of {exits}"
    )
    if len(found.top) > 1:
        text += "  then " + _listed(found.top[1:])
    if found.exits:
        text += "  at each exit " + _listed(found.exits)
    return text


def _listed(guesses: tuple[Guess, ...]) -> str:
    from ..checks import printable

    return ", ".join(f"{printable(guess.class_name)} {guess.probability:.1%}" for guess in guesses)


@contextlib.contextmanager
def _progress(
    total: int, arguments: argparse.Namespace
) -> Iterator[tuple[Callable[[], None], Callable[[str], None]]]:
    """(advance, say): a bar on stderr and a function that prints above it. No bar if stderr is no
    terminal, or if lines on the same terminal show how far it is."""
    shows_lines = (arguments.csv is None or arguments.json) and sys.stdout.isatty()
    if not sys.stderr.isatty() or shows_lines:
        yield lambda: None, _say
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from ..console import say

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("images", total=total)
        yield lambda: bar.advance(task), lambda text: say(console, text)
