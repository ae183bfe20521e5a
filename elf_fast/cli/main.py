"""The command `elf-fast`. Subcommands import what they need when they run, so --help is fast."""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import sys

from .. import __version__
from ..memory import is_lost_worker, is_out_of_memory
from . import advise, bench, calibrate, demo, doctor, evaluate, interrupts, predict, train
from .errors import Parser, UserError, fail

#: Subcommands in the order of `elf-fast --help`.
_COMMANDS = (demo, train, calibrate, evaluate, predict, advise, bench, doctor)
#: By module, the packages of the `train` extra that the commands need.
_EXTRA = {
    "PIL": "pillow", "huggingface_hub": "huggingface_hub", "rich": "rich",
    "safetensors": "safetensors", "scipy": "scipy", "sklearn": "scikit-learn",
    "tensorboard": "tensorboard", "timm": "timm", "torchmetrics": "torchmetrics",
    "torchvision": "torchvision", "yaml": "pyyaml",
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file name may be none of its encoding
            stream.reconfigure(errors="backslashreplace")
    given = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_args(given, argparse.Namespace(given=given))
    try:
        with interrupts.second_ends_at_once():
            return arguments.run(arguments)
    except UserError as error:
        return fail(str(error))
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in {*_EXTRA, "wandb"}:
            raise
        return fail(f"{name} is not installed: {_cure(name)}")
    except BrokenPipeError:
        # The reader of stdout (`| head`) has ended. Without this, the flush at exit would fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        what = error.strerror or str(error) or type(error).__name__  # libraries raise empty ones
        return fail(f"{where}{what}")
    except KeyboardInterrupt as error:  # it may say how to go on
        print("; ".join(["elf-fast: stopped", *map(str, error.args)]), file=sys.stderr)
        return interrupts.STATUS
    except (MemoryError, RuntimeError) as error:
        if is_lost_worker(error):  # raised outside of the loader
            from ..data.loader import WorkerError

            return fail(str(WorkerError.because(error)))
        if not is_out_of_memory(error):
            raise
        return fail(f"out of memory: smaller batches or images need less ({error})")


def parser() -> Parser:
    """The parser of all subcommands. The chosen one's function is in the namespace, as `run`."""
    made = Parser(
        prog="elf-fast", description="Early-exit training and inference for long-tailed data (ELF)."
    )
    made.add_argument("--version", action="version", version=f"elf_fast {__version__}")
    commands = made.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands).set_defaults(run=command.run)
    return made


def _cure(name: str) -> str:
    """How to install what a missing module belongs to: all of the extra that is missing."""
    if name not in _EXTRA:
        return f"pip install {name}"
    missing = [package for module, package in _EXTRA.items()
               if module == name or importlib.util.find_spec(module) is None]  # fmt: skip
    return f'pip install {" ".join(missing)} (or pip install ".[train]" in the source folder)'
