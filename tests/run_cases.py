"""Runs that several tests make: their settings, their images, and the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from elf_fast import cli
from elf_fast.cli import flags
from elf_fast.runs import opening, plain
from elf_fast.runs.config import TrainConfig
from elf_fast.runs.evaluation import evaluate

QUIET = Console(quiet=True)

DIGITS = TrainConfig(
    dataset="digits",
    imbalance=50.0,
    model="cifar_resnet8",
    epochs=1,
    batch_size=64,
    lr=0.05,
    warmup_epochs=0,
    workers=0,
    log_tensorboard=False,
)

#: Flags of a short run on `coloured_images`.
FLAGS = (
    "--model cifar_resnet8 --transforms small --img-size 16 --epochs 4 --batch-size 16 --lr 0.05 "
    "--warmup-epochs 0 --workers 0 --no-log-tensorboard --loss balanced_softmax "
    "--train-thresholds 0.8 --device cpu"
).split()


def coloured_images(root: Path, counts: dict[str, tuple[int, ...]]) -> Path:
    """Writes images of classes that differ in colour into root/<part>/class<c>; counts: by part,
    the images of each class."""
    generator = torch.Generator().manual_seed(0)
    for part, of_class in counts.items():
        for c, n in enumerate(of_class):
            (root / part / f"class{c}").mkdir(parents=True)
            for i in range(n):
                image = torch.randint(0, 120, (16, 16, 3), generator=generator, dtype=torch.uint8)
                image[..., c] += 100
                Image.fromarray(image.numpy()).save(root / part / f"class{c}" / f"{i}.png")
    return root


def parsed(*given: str) -> TrainConfig:
    """The settings that the flags of a command line give, without a YAML file."""
    parser = argparse.ArgumentParser()
    flags.add_flags(parser)
    return plain.from_dict(flags.from_arguments(parser.parse_args(given)))


def printed(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """What a successful command prints."""
    assert cli.main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The message of an error that the user can correct: one line on stderr, exit status 2."""
    assert cli.main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("elf-fast: ")
    assert "Traceback" not in captured.err
    return captured.err


def evaluated(path: Path, weights: dict, metadata: dict, **overrides) -> tuple[str, dict]:
    """(part, metrics) of a run, as `elf-fast eval` opens it and the trainer measures it."""
    run = opening.evaluation(path, weights, metadata, **overrides)
    config = plain.from_run(metadata["config"], **overrides)
    return run.part, evaluate(config, run.model, run.batches, run.class_counts, run.flops)
