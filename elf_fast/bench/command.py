"""`elf-fast bench`: a network of the user's choice with and without exits, side by side."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from .. import checks
from ..backbones import create, default_exits
from ..models import from_backbone
from ..timing import Samples, sample
from . import engines, inference, training
from .workload import inference_work, training_work


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints and returns one row for each share and mode, by the `options` of `elf-fast bench`:
    {"mode", "share", "microseconds", "speed"}. `microseconds` is the time per call of each
    candidate, and `speed` the speed of elf_fast divided by the candidate's; both are
    [median, lower quartile, upper quartile].

    Raises:
        ValueError: the network, a module or the device does not exist, or a number is out of range.
    """
    checks.integer("--batch", options.batch, 1, 2**20)
    checks.integer("--size", options.size, 1, 2**14)
    checks.integer("--classes", options.classes, 2, 2**20)
    checks.at_least("--seconds", options.seconds, 0.0, 86_400.0)
    if not all(0 <= share <= 1 for share in options.share):
        raise ValueError(f"--share: expected numbers in [0, 1], got {options.share}")
    torch.manual_seed(0)
    device = checks.device(options.device)
    layout = torch.channels_last
    try:
        backbone = create(options.model, options.classes).to(device).to(memory_format=layout)
    except ValueError as error:  # `create` calls the flag by its own argument's name
        raise ValueError(f"--model: {str(error).removeprefix('name: ')}") from error
    images = torch.randn(options.batch, 3, options.size, options.size)
    images = images.to(device, memory_format=layout)
    exits = options.exits.split(",") if options.exits else default_exits(backbone)
    model = from_backbone(backbone, exits, options.classes, example_input=images[:1])
    on_engines = options.engine and engines.engines_of(
        model.eval(), images[:2], options.engine, options.batch
    )
    rows = []
    for share in options.share:
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
        print(f"{options.model}, exits after {', '.join(exits)}; batch {options.batch} of "
              f"{options.size}x{options.size}, {device}")  # fmt: skip
        _print(rows)
    return rows


def _row(mode: str, share: float, samples: Samples) -> dict[str, Any]:
    return {
        "mode": mode,
        "share": share,
        "microseconds": {name: samples.time(name) for name in samples},
        "speed": {name: samples.ratio(name, "elf_fast") for name in samples if name != "elf_fast"},
    }


def _engine_row(name: str, share: float, samples: Samples) -> dict[str, Any]:
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
            table.add_row(f"{row['share']:.0%}", f"{row['microseconds'][subject][0] / 1e3:.3g}",
                          *cells)  # fmt: skip
        LastingConsole().print(table)
    print(
        "full: without exits. reference: plain PyTorch. oracle: the stages alone on batches "
        "compacted\nbeforehand, which no early exit can beat. The network is untrained: the share "
        "that goes on is\nset, not learned."
    )
