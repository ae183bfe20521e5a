"""`elf-fast train`"""

from __future__ import annotations

import argparse
import contextlib
import shlex
from pathlib import Path
from typing import Any

from ..runs.config import HINTS
from .errors import UserError, check_path, with_flags
from .flags import add_flags, from_arguments, group_of
from .metrics import show


def add(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "train",
        help="train a network with early exits, or without, on long-tailed images",
        description="Trains, chooses thresholds on validation, evaluates once on the test part and "
        "writes weights, metrics.json, config.yaml and checkpoints into --output. Under torchrun, "
        "trains on all of its processes. Keys of the YAML file are the flags' names with "
        "underscores; flags override the file, and the file overrides the defaults. The value "
        "`none` removes an optional setting. "
        "docs/training.md has examples.",
        usage="elf-fast train [-c FILE] [--resume RUN] [settings]",
    )
    parser.add_argument("-c", "--config", type=Path, metavar="FILE", help="settings as YAML")
    parser.add_argument("--resume", type=Path, metavar="RUN",
                        help="continue the run in this folder, with its settings, from its newest "
                        "good checkpoint; if it holds no run, start one there from the other "
                        "flags")  # fmt: skip
    add_flags(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    from ..data import DataError
    from ..training.processes import Stopped, joined
    from ..training.trainer import NonFiniteError, Trainer

    folder = arguments.resume
    with contextlib.ExitStack() as stack:
        try:
            config = _settings(arguments)
            processes = stack.enter_context(joined(config.device))
            trainer = Trainer(config, processes)
            if folder is not None:  # in every process, even one that sees no run in the folder
                trainer.resume()
        except (TypeError, ValueError) as error:
            raise UserError(with_flags(str(error), HINTS)) from error
        try:
            results = trainer.run()
        except KeyboardInterrupt as error:
            if processes.is_first:
                raise KeyboardInterrupt(_how_to_go_on(config.output)) from error
            raise
        except (NonFiniteError, DataError) as error:
            raise UserError(with_flags(str(error), HINTS)) from error
        except Stopped as stopped:
            return 128 + stopped.signal
        if processes.is_first:
            for part in ("validation", "test"):
                if part in results:
                    show(f"{config.output}: {part}", results[part])
    return 0


def _how_to_go_on(output: str) -> str:
    """What to type after Ctrl-C."""
    from ..runs.opening import CHECKPOINTS

    if any(Path(output, CHECKPOINTS).glob("step-????????")):
        return f"to go on from the newest checkpoint: elf-fast train --resume {shlex.quote(output)}"
    return "there is no checkpoint yet: the same command starts again"


def _settings(arguments: argparse.Namespace) -> Any:
    """The `TrainConfig` from the flags, the YAML file and the run to resume."""
    from ..runs.plain import from_dict, load_yaml
    from ..training.trainer import CONFIG, resumed_config

    folder = arguments.resume
    for flag, path in (("--config", arguments.config), ("--resume", folder)):
        if path is not None:
            check_path(flag, path)
    given = load_yaml(arguments.config) if arguments.config else {}
    flags = from_arguments(arguments)
    if folder is not None and Path(flags.get("output", folder)) != folder:
        raise UserError(
            f"--output: expected {folder} or none with --resume {folder}, got {flags['output']}"
        )
    _check_no_exits(flags)
    given.update(flags)
    if folder is None:
        return from_dict(given)
    if (folder / CONFIG).exists():
        return resumed_config(folder, **given)
    if not given:
        raise UserError(f"--resume: expected the folder of a run, got {folder}")
    return from_dict({**given, "output": str(folder)})


def _check_no_exits(flags: dict[str, Any]) -> None:
    """Settings of exits beside --no-exits are a mistake on one command line. In a file they are
    not: the flag is how to train the same without exits."""
    if flags.get("exits") == ():
        for name in flags:
            if name != "exits" and group_of(name) == "exits":
                raise UserError(
                    f"--{name.replace('_', '-')}: expected none with --no-exits, got {flags[name]}"
                )
