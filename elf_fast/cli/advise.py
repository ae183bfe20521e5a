"""`elf-fast advise`"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError, check_path, with_flags

if TYPE_CHECKING:
    from ..modules import ELF
    from ..policy.advise import Rival


def add(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "advise",
        help="say whether the exits of a run pay on this machine",
        description="Times a run's network with its exits, without them, and other networks that "
        "you name, and says for every batch size which one to use, and why. The share of images "
        "that leaves at each exit is that of the calibration (policy.json) or else of the run's "
        "test. The images are random.",
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN",
                        help="folder of a run, of the demo or of elf_fast.save")  # fmt: skip
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64], metavar="N",
                        help="images in a batch (default: 1 16 64)")  # fmt: skip
    parser.add_argument("--rival", nargs="+", default=[], metavar="NAME|RUN",
                        help="other networks: a name of timm or torchvision, or a run's folder, "
                        "whose validation accuracy is then compared; a network of several exits "
                        "counts without them")  # fmt: skip
    parser.add_argument("--engine", default="auto", choices=["auto", "eager", "inductor"],
                        help="the engine of inference.compile that runs them all; eager spares the "
                        "minutes of compilation (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S",
                        help="time to measure for each batch size (default: "
                        "%(default)s)")  # fmt: skip
    parser.add_argument("--device", metavar="DEVICE",
                        help="device to run on (default: cuda if there is one)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print times and verdicts as JSON")
    return parser


def run(arguments: argparse.Namespace) -> int:
    try:
        advice = _advice(arguments)
    except (TypeError, ValueError) as error:
        raise UserError(with_flags(str(error), vars(arguments))) from error
    print(json.dumps(advice.to_dict(), indent=1) if arguments.json else advice)
    return 0


def _advice(arguments: argparse.Namespace) -> Any:
    import torch

    from .. import checks
    from ..policy.advise import advise
    from ..runs.loading import load
    from ..runs.measured import exit_shares

    path, device = arguments.run_folder, checks.device(arguments.device)
    check_path("RUN", path)
    for N in arguments.batch:
        if not 1 <= N <= 2**16:
            raise UserError(f"--batch: expected integers of 1 to {2**16:,}, got {N}")
    if len(set(arguments.batch)) < len(arguments.batch):
        raise UserError(f"--batch: expected each size once, got {arguments.batch}")
    if not 0 <= arguments.seconds <= 86_400:
        raise UserError(f"--seconds: expected 0 to 86,400, got {arguments.seconds}")
    model = load(path, device=device)
    if model.transform is None:
        raise UserError(f"{path}: expected a network saved with transform=, got one without")
    if len(model.stages) == 1:
        raise UserError(f"{path}: expected a network with early exits, got one without")
    found = exit_shares(path, model)
    if found is None:
        raise UserError(
            f"{path}: expected known shares of images that leave at each exit, got none: run "
            "elf-fast calibrate first"
        )
    known = None if model.policy is None else model.policy.measured
    return advise(
        model,
        torch.zeros(1, *model.transform.shape, device=device),
        found[0],
        batches=arguments.batch,
        engine=arguments.engine,
        accuracy=None if known is None else known.accuracy.value,
        accuracy_exits_off=None if known is None else known.accuracy_exits_off.value,
        rivals={name: _rival(name, model, device) for name in arguments.rival},
        seconds=arguments.seconds,
    )


def _rival(name: str, model: ELF, device: Any) -> Rival:
    """A network by name, untrained, or that of a run."""
    from ..backbones import create
    from ..policy.advise import Rival
    from ..runs.loading import load
    from ..runs.measured import accuracy, validation_digest

    check_path("--rival", name)
    if not Path(name).exists():
        try:
            network = create(name, len(model.class_names))
        except ValueError as error:
            raise UserError(f"--rival: {str(error).removeprefix('name: ')}") from error
        return Rival(network.to(device).eval())
    other = load(name, device=device)
    theirs = None if other.transform is None else other.transform.shape
    if model.transform is not None and theirs != model.transform.shape:
        raise UserError(
            f"--rival: expected a network for images {list(model.transform.shape)}, got {name} for "
            f"{'unknown ones' if theirs is None else list(theirs)}"
        )
    if other.class_names != model.class_names:
        raise UserError(f"--rival: expected a run with the same classes, got {name}")
    ours = None if model.policy is None else model.policy.data_digest
    same_images = ours is not None and ours == validation_digest(Path(name))
    return Rival(other, accuracy(Path(name), other) if same_images else None)
