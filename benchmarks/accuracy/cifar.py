"""CIFAR-10-LT: runs through `elf-fast train`, on CIFAR-10 as an image folder.

The schedule is short enough for CPUs: bfloat16, channels-last, and a tenth of the usual 200 epochs
at imbalance 100. At 500 and 10 there are two thirds as many steps; their epochs are shorter and
longer. A seed draws the weights, the order and the augmentation. All runs have the same images in
the tail and in validation (data seed 0).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ..environment import environment
from .runs import Run
from .trial import FLOPS_LIMIT, KEPT, as_json

PATH = Path(__file__).resolve().parents[1] / "results" / "accuracy-cifar10.jsonl"
#: Epochs at each imbalance, the most informative first.
EPOCHS = {100: 20, 500: 16, 10: 8}
SEEDS = (0, 1, 2)
LOSSES = {
    "ce": ["--loss", "cross_entropy"],
    "balanced_softmax": ["--loss", "balanced_softmax"],
    "ldam_drw": ["--loss", "ldam"],
}
VARIANTS = {"plain": ["--no-exits"], "keep": ["--conv-heads", "--keep-exited"]}
SETTINGS = """
    --img-size 32 --transforms small --validation-fraction 0.1 --model cifar_resnet32
    --warmup-epochs 2 --val-interval 5
    --workers 0 --amp --channels-last --no-log-tensorboard
""".split()


def table() -> list[Run]:
    """Every run, the most informative first."""
    return [
        Run(imbalance, loss, "conv", variant, seed)
        for imbalance, loss, seed, variant in product(EPOCHS, LOSSES, SEEDS, VARIANTS)
    ]


def perform(run: Run, images: Path, work: Path) -> dict[str, Any]:
    """Trains and tests in a folder of its own under `work`. An interrupted training goes on, and
    the results of a finished one are read.

    Returns: a record like that of `trial.perform`, with the settings as well. The network without
    exits has the operating point "full". One with exits has "chosen", the trainer's choice, and
    "best", its choice within FLOPS_LIMIT.

    Raises:
        subprocess.CalledProcessError: the training failed; the reason is on stderr.
    """
    folder = work / f"cifar10-{run.imbalance}-{run.loss}-{run.variant}-{run.seed}"
    results, trained = folder / "metrics.json", folder / "trained.json"
    if not trained.exists():
        if (folder / "config.yaml").exists():
            _train("--resume", str(folder))
        else:
            _train("--data-dir", str(images), "--output", str(folder), *settings(run))
        shutil.copy(results, trained)
    found = json.loads(trained.read_text(encoding="utf-8"))
    points = {"full" if run.variant == "plain" else "chosen": found}
    if run.variant != "plain":
        _train("--resume", str(folder), "--max-flops", str(FLOPS_LIMIT))
        points["best"] = json.loads(results.read_text(encoding="utf-8"))
    return as_json(
        {
            "class_counts": found["class_counts"],
            "settings": {
                k: v for k, v in found["settings"].items() if k not in ("data_dir", "output")
            },
            "calibration": {k: point.get("calibration") for k, point in points.items()},
            "test": {
                k: {name: point["test"][name] for name in KEPT} for k, point in points.items()
            },
            "environment": environment(),
        }
    )


def settings(run: Run) -> list[str]:
    """The flags that a run is trained with."""
    epochs = EPOCHS[run.imbalance]
    flags = [*SETTINGS, *LOSSES[run.loss], *VARIANTS[run.variant], "--epochs", str(epochs)]
    if run.loss == "ldam_drw":
        # Re-weighted in the last fifth, as Cao et al. (arXiv 1906.07413, section 4).
        flags += ["--drw-epoch", str(epochs * 4 // 5)]
    return [*flags, "--imbalance", str(run.imbalance), "--seed", str(run.seed)]


def _train(*flags: str) -> None:
    command = [sys.executable, "-m", "elf_fast.cli", "train", *flags]
    threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=threads)
