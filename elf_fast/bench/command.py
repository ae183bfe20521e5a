"""`elf-fast bench`: a network of the user's choice with and without exits, side by side."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .. import checks
from ..backbones import create, default_exits
from ..models import from_backbone
from ..modules import ELF
from ..timing import Samples, sample
from . import CLASSES, MODEL, SIZE, engines, inference, training
from .workload import going_on, inference_work, training_work

#: Shares that go on after each exit, if nothing is known.
_SHARES = (0.5, 0.8, 1.0)


class Trained(NamedTuple):
    """A trained network to time."""

    model: ELF  # on its device
    shape: Sequence[int]  # of its images, [D, H, W]
    exit_shares: Sequence[float] | None  # [E] of images that left at each exit, if measured


def run(options: argparse.Namespace, trained: Trained | None = None) -> list[dict[str, Any]]:
    """Prints and returns one row for each share and mode, by the `options` of `elf-fast bench`:
    {"mode", "share", "microseconds", "speed"}. `microseconds` is the time per call of each
    candidate, and `speed` the speed of elf_fast divided by the candidate's; both are
    [median, lower quartile, upper quartile]. `share` is what goes on after every exit, or [E-1]
    numbers.

    Args:
        trained: the network; None: the untrained one that the options name.

    Raises:
        ValueError: the network, a module or the device does not exist, or a number is out of range.
    """
    checks.integer("--batch", options.batch, 1, 2**20)
    checks.at_least("--seconds", options.seconds, 0.0, 86_400.0)
    if not all(0 <= share <= 1 for share in options.share or ()):
        raise ValueError(f"--share: expected numbers in [0, 1], got {options.share}")
    torch.manual_seed(0)
    layout = torch.channels_last
    if trained is None:
        model, (D, H, W), exits = _untrained(options)
    else:
        model, (D, H, W) = trained.model.to(memory_format=layout), trained.shape
        exits = f"{len(model.stages)} exits, trained"
    device = model.thresholds.device
    images = torch.randn(options.batch, D, H, W).to(device, memory_format=layout)
    on_engines = options.engine and engines.engines_of(
        model.eval(), images[:2], options.engine, options.batch
    )
    shares: list[float | list[float]] = list(options.share or _SHARES)
    if options.share is None and trained is not None and trained.exit_shares is not None:
        shares = [going_on(trained.exit_shares)]
    rows = []
    for share in shares:
        work = inference_work(model, images, share)
        with torch.inference_mode():
            samples = sample(inference.candidates(work), seconds=options.seconds)
        rows.append(_row("inference", share, samples))
        if on_engines:
            found = engines.candidates(on_engines, work)
            with torch.inference_mode():
                samples = sample(found, seconds=options.seconds)
            rows += [_engine_row(name, share, samples) for name in options.engine]
        if options.training:
            steps = training.candidates(training_work(model, images, share))
            rows.append(_row("training step", share, sample(steps, seconds=options.seconds)))
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        print(f"{options.model or MODEL}, {exits}; batch {options.batch} of {H}x{W}, {device}")
        _print(rows)
        if trained is None:
            print("The network is untrained: the share that goes on is set, not learned.")
    return rows


def _untrained(options: argparse.Namespace) -> tuple[ELF, Sequence[int], str]:
    """(model, shape of images, its exits in words)."""
    size = SIZE if options.size is None else options.size
    classes = CLASSES if options.classes is None else options.classes
    checks.integer("--size", size, 1, 2**14)
    checks.integer("--classes", classes, 2, 2**20)
    device, layout = checks.device(options.device), torch.channels_last
    try:
        backbone = create(options.model or MODEL, classes).to(device).to(memory_format=layout)
    except ValueError as error:  # `create` calls the flag by its own argument's name
        raise ValueError(f"--model: {str(error).removeprefix('name: ')}") from error
    shape = (3, size, size)
    example = torch.randn(1, *shape).to(device, memory_format=layout)
    exits = options.exits.split(",") if options.exits else default_exits(backbone)
    model = from_backbone(backbone, exits, classes, example_input=example)
    return model, shape, f"exits after {', '.join(exits)}"


def _row(mode: str, share: float | list[float], samples: Samples) -> dict[str, Any]:
    return {
        "mode": mode,
        "share": share,
        "microseconds": {name: samples.time(name) for name in samples},
        "speed": {name: samples.ratio(name, "elf_fast") for name in samples if name != "elf_fast"},
    }


def _engine_row(name: str, share: float | list[float], samples: Samples) -> dict[str, Any]:
    """`speed`: that of the engine with exits as a multiple of others, exits on and off."""
    return {
        "mode": f"engine {name}",
        "share": share,
        "microseconds": {other: samples.time(other) for other in samples},
        "speed": {other: samples.ratio(other, name) for other in samples if other != name},
    }


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from ..console import LastingConsole

    for mode in dict.fromkeys(row["mode"] for row in rows):
        of_mode = [row for row in rows if row["mode"] == mode]
        others = list(of_mode[0]["speed"])
        subject = mode.removeprefix("engine ") if mode.startswith("engine ") else "elf_fast"
        table = Table(title=f"{mode}: time of {subject}, and its speed as a multiple of")
        for heading in ("goes on", f"{subject}, ms", *others):
            table.add_column(heading, justify="right")
        for row in of_mode:
            cells = [f"{m:.2f} ({low:.2f}..{high:.2f})" for m, low, high in row["speed"].values()]
            table.add_row(_shown(row["share"]), f"{row['microseconds'][subject][0] / 1e3:.3g}",
                          *cells)  # fmt: skip
        LastingConsole().print(table)
    print(
        "full: without exits. reference: plain PyTorch. oracle: the stages alone on batches "
        "compacted\nbeforehand, which no early exit can beat."
    )


def _shown(share: float | list[float]) -> str:
    return " / ".join(f"{s:.0%}" for s in (share if isinstance(share, list) else [share]))
