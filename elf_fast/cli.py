"""The command `elf-fast`. Every command imports what it needs when it runs, so help is quick."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from .training.config import add_flags

#: Modules of the `train` extra that the commands need.
_EXTRA = {
    "PIL", "matplotlib", "rich", "safetensors", "sklearn", "tensorboard", "timm", "torchmetrics",
    "torchvision", "yaml",
}  # fmt: skip


class UserError(Exception):
    """What the user can put right: one line on stderr, exit status 2."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.command(arguments)
    except UserError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in _EXTRA | {"wandb"}:
            raise
        cure = '"elf_fast[train]"' if name in _EXTRA else name
        return _fail(f"{name} is not installed: pip install {cure}")
    except BrokenPipeError:
        # Whoever read stdout (`| head`) is gone; Python's flush at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}")
    except KeyboardInterrupt:
        print("elf-fast: stopped", file=sys.stderr)
        return 130


def _fail(message: str) -> int:
    lines = (" ".join(line.split()) for line in message.splitlines())
    print(f"elf-fast: {'; '.join(filter(None, lines))}", file=sys.stderr)
    return 2


def _positive(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="elf-fast", description="Early-exit training and inference for long-tailed data (ELF)."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="train ELF and the same network without exits on long-tailed digits; write a report",
        description="Trains a small network without exits and with them (ELF) on scikit-learn's "
        "digits made long-tailed, chooses thresholds on validation, compares accuracy, FLOPs and "
        "speed on the test set, and writes report.html, accuracy_flops.png, results.json and "
        "model.safetensors. Takes about two minutes on two CPU cores.",
    )
    demo.add_argument("--output", type=Path, default=Path("demo"), metavar="FOLDER",
                      help="where to write (default: %(default)s)")  # fmt: skip
    demo.add_argument("--seeds", type=_positive, default=3, metavar="N",
                      help="trainings of each network (default: %(default)s)")  # fmt: skip
    demo.add_argument("--epochs", type=_positive, default=40, metavar="N",
                      help="passes over the training data (default: %(default)s)")  # fmt: skip
    demo.set_defaults(command=_demo)

    train = commands.add_parser(
        "train",
        help="train a network with early exits, or without, on long-tailed images",
        description="Trains, chooses thresholds on validation, evaluates once on the test part and "
        "writes weights, metrics.json, config.yaml and checkpoints into --output. Under torchrun, "
        "trains on all of its processes. Keys of the YAML file are the flags' names with "
        "underscores; flags go before the file, and the file before the defaults. "
        "docs/training.md has examples.",
        usage="elf-fast train [-c FILE] [--resume RUN] [settings]",
    )
    train.add_argument("-c", "--config", type=Path, metavar="FILE", help="settings as YAML")
    train.add_argument("--resume", type=Path, metavar="RUN",
                       help="go on with the run in this folder, with its settings, from its newest "
                       "good checkpoint; start one there if there is none and other flags say what "
                       "to train")  # fmt: skip
    add_flags(train)
    train.set_defaults(command=_train)

    evaluate = commands.add_parser(
        "eval",
        help="evaluate a run, the demo or a checkpoint on its test set",
        description="Prints accuracy, exit shares and the share of FLOPs on the test part, or on "
        "validation where there is none: the numbers that the run wrote into metrics.json, or the "
        "demo into results.json.",
    )
    evaluate.add_argument("checkpoint", type=Path, metavar="RUN",
                          help="folder of a run or of the demo, a run's checkpoint, or "
                          "weights")  # fmt: skip
    evaluate.add_argument("--data-dir", metavar="FOLDER", help="where the images are now")
    evaluate.add_argument("--lists", metavar="FOLDER", help="where the split lists are now")
    evaluate.add_argument("--json", action="store_true", help="print all metrics as JSON")
    evaluate.set_defaults(command=_eval)

    bench = commands.add_parser(
        "bench",
        help="time a network with exits beside plain PyTorch and the network without them",
        description="Times a network of your choice, untrained, with early exits: inference and, "
        "if asked, training steps, beside the plain PyTorch module, the network without exits, and "
        "the oracle: its stages on batches made smaller beforehand, as fast as early exit can be.",
    )
    bench.add_argument("--model", default="torchvision/resnet18", metavar="NAME",
                       help="a network of timm or torchvision, or cifar_resnet32 "
                       "(default: %(default)s)")  # fmt: skip
    bench.add_argument("--exits", metavar="MODULE,...",
                       help="modules to put exits after (default: three, evenly)")  # fmt: skip
    bench.add_argument("--batch", type=int, default=64, metavar="N",
                       help="images in a batch (default: %(default)s)")  # fmt: skip
    bench.add_argument("--size", type=int, default=224, metavar="PIXELS",
                       help="height and width of the images (default: %(default)s)")  # fmt: skip
    bench.add_argument("--classes", type=int, default=1000, metavar="C",
                       help="(default: %(default)s)")  # fmt: skip
    bench.add_argument("--share", type=float, nargs="+", default=[0.5, 0.8, 1.0], metavar="S",
                       help="shares of the samples that go on after each exit; 1 switches the "
                       "exits off (default: 0.5 0.8 1)")  # fmt: skip
    bench.add_argument("--training", action="store_true", help="time training steps, too")
    bench.add_argument("--seconds", type=float, default=10.0, metavar="S",
                       help="for each row of the table (default: %(default)s)")  # fmt: skip
    bench.add_argument("--device", metavar="DEVICE", help="(default: cuda if there is one)")
    bench.add_argument("--json", action="store_true", help="print the rows as JSON")
    bench.set_defaults(command=_bench)

    doctor = commands.add_parser(
        "doctor",
        help="say which kernels serve each device, and why",
        description="Prints versions, devices and what serves the operators on each, and why.",
    )
    doctor.set_defaults(command=_doctor)
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    from .training import demo

    if arguments.output.exists() and not arguments.output.is_dir():
        raise UserError(f"--output: expected a folder, got the file {arguments.output}")
    demo.run(arguments.output, seeds=arguments.seeds, epochs=arguments.epochs)
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from .data import DataError
    from .training import distributed
    from .training.config import from_arguments, from_dict, load_yaml
    from .training.trainer import CONFIG, NonFiniteError, Trainer, resumed_config

    folder = arguments.resume
    try:
        given = load_yaml(arguments.config) if arguments.config else {}
        flags = from_arguments(arguments)
        if folder is not None and Path(flags.get("output", folder)) != folder:
            raise UserError(
                f"--output: expected {folder} or none beside --resume {folder}, "
                f"got {flags['output']}"
            )
        given.update(flags)
        resume = folder is not None and (folder / CONFIG).exists()
        if folder is not None and not resume:
            if not given:
                raise UserError(f"--resume: expected the folder of a run, got {folder}")
            given["output"] = str(folder)
        config = resumed_config(folder, **given) if resume else from_dict(given)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    with contextlib.ExitStack() as stack:
        try:
            ranks = stack.enter_context(distributed.ranks(config.device))
            trainer = Trainer(config, ranks)
            if folder is not None:  # on every rank, whatever it sees of the folder
                trainer.resume()
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error
        try:
            results = trainer.run()
        except (NonFiniteError, DataError) as error:
            raise UserError(str(error)) from error
        if ranks.is_first:
            for part in ("validation", "test"):
                if part in results:
                    _show(f"{config.output}: {part}", results[part])
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from .training.evaluate import evaluate_saved

    moved = {"data_dir": arguments.data_dir, "lists": arguments.lists}
    overrides = {name: folder for name, folder in moved.items() if folder is not None}
    try:
        metadata, metrics = evaluate_saved(arguments.checkpoint, **overrides)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    if arguments.json:
        print(json.dumps(metrics, indent=1))
    else:
        _show(f"{arguments.checkpoint}: seed {metadata['seed']}, {metadata['part']} set", metrics)
    return 0


def _show(heading: str, metrics: dict[str, Any]) -> None:
    print(heading)
    for key in ("overall", "many", "medium", "few", "flops_share"):
        label = "FLOPs, % of without exits" if key == "flops_share" else f"accuracy {key}, %"
        print(f"  {label:26}{_percent(metrics[key])}")
    shares = " / ".join(_percent(share) for share in metrics["exit_shares"])
    print(f"  {'left at each exit, %':26}{shares}")


def _bench(arguments: argparse.Namespace) -> int:
    from .bench import command

    try:
        command.run(arguments)
    except ValueError as error:
        raise UserError(str(error)) from error
    return 0


def _percent(value: Any) -> str:
    return "none" if value is None else f"{100 * value:.1f}"


def _doctor(arguments: argparse.Namespace) -> int:
    import torch

    from . import __version__, report

    print(f"elf_fast {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"CPU: {platform.machine()}, {torch.get_num_threads()} threads for torch")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            print(f"GPU {i}: {torch.cuda.get_device_name(i)}")
    else:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        print(f"GPU: none that torch can use (torch is {built})")
    for key, line in report().items():
        print(f"{'chosen backend' if key == 'chosen' else f'{key} tensors'}: {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
