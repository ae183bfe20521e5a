"""The command `elf-fast`. Subcommands import what they need when they run, so --help is fast."""

from __future__ import annotations

import argparse
import io
import os
import sys

from .. import checks
from ..memory import is_lost_worker, is_out_of_memory
from . import advise, bench, demo, doctor, evaluate, interrupts, predict, train
from .errors import UserError

#: Subcommands in the order of `elf-fast --help`.
_COMMANDS = (demo, train, evaluate, predict, advise, bench, doctor)
#: Modules of the `train` extra that the commands need.
_EXTRA = {
    "PIL", "huggingface_hub", "matplotlib", "rich", "safetensors", "scipy", "sklearn",
    "tensorboard", "timm", "torchmetrics", "torchvision", "yaml",
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file name may be none of its encoding
            stream.reconfigure(errors="backslashreplace")
    arguments = parser().parse_args(argv)
    try:
        with interrupts.second_ends_at_once():
            return arguments.run(arguments)
    except UserError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in _EXTRA | {"wandb"}:
            raise
        cure = '"elf_fast[train]"' if name in _EXTRA else name
        return _fail(f"{name} is not installed: pip install {cure}")
    except BrokenPipeError:
        # The reader of stdout (`| head`) has ended. Without this, the flush at exit would fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}")
    except KeyboardInterrupt:
        print("elf-fast: stopped", file=sys.stderr)
        return interrupts.STATUS
    except (MemoryError, RuntimeError) as error:
        if is_lost_worker(error):  # raised outside of the loader
            from ..data.loader import WorkerError

            return _fail(str(WorkerError.because(error)))
        if not is_out_of_memory(error):
            raise
        return _fail(f"out of memory: smaller batches or images need less ({error})")


def parser() -> argparse.ArgumentParser:
    """The parser of all subcommands. The chosen one's function is in the namespace, as `run`."""
    made = argparse.ArgumentParser(
        prog="elf-fast", description="Early-exit training and inference for long-tailed data (ELF)."
    )
    commands = made.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands).set_defaults(run=command.run)
    return made


def _fail(message: str) -> int:
    lines = (" ".join(line.split()) for line in message.splitlines())
    print(f"elf-fast: {checks.printable('; '.join(filter(None, lines)))}", file=sys.stderr)
    return 2
