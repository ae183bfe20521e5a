"""CIFAR-10-LT: runs through `elf-fast train`, on CIFAR-10 as an image folder.

The schedule is a short one, for CPUs: bfloat16, channels-last, a tenth of the usual 200 epochs.
A seed draws the weights, the order and the augmentation; the images of tail and validation are one
choice for all (data seed 0).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ..environment import environment
from .runs import Run
from .trial import KEPT, as_json

PATH = Path(__file__).resolve().parents[1] / "results" / "accuracy-cifar10.jsonl"
IMBALANCES = (100, 500, 10)
SEEDS = (0, 1, 2)
EPOCHS = 20
LOSSES = {
    "ce": ["--loss", "cross_entropy"],
    "balanced_softmax": ["--loss", "balanced_softmax"],
    # Re-weighted in the last fifth, as Cao et al. (arXiv 1906.07413, section 4).
    "ldam_drw": ["--loss", "ldam", "--drw-epoch", str(EPOCHS * 4 // 5)],
}
VARIANTS = {"plain": ["--no-exits"], "keep": ["--conv-heads", "--keep-exited"]}
SETTINGS = f"""
    --img-size 32 --transforms small --validation-fraction 0.1 --model cifar_resnet32
    --epochs {EPOCHS} --warmup-epochs 2 --val-interval 5
    --workers 0 --amp --channels-last --no-log-tensorboard
""".split()


def table() -> list[Run]:
    """Every run, in the order in which they are worth having."""
    return [
        Run(imbalance, loss, "conv", variant, seed)
        for imbalance, loss, seed, variant in product(IMBALANCES, LOSSES, SEEDS, VARIANTS)
    ]


def perform(run: Run, images: Path, work: Path) -> dict[str, Any]:
    """Trains and tests, in a folder of its own under `work`: what was interrupted goes on, what has
    finished is read. The record is as that of `trial.perform`, with the operating point "full" of
    the network without exits or "chosen", by the trainer, of the one with exits, and the settings.

    Raises:
        subprocess.CalledProcessError: the training failed; it said why on stderr.
    """
    folder = work / f"cifar10-{run.imbalance}-{run.loss}-{run.variant}-{run.seed}"
    if not (folder / "metrics.json").exists():
        command = [sys.executable, "-m", "elf_fast.cli", "train"]
        if (folder / "config.yaml").exists():
            command += ["--resume", str(folder)]
        else:
            command += ["--data-dir", str(images), "--output", str(folder), *SETTINGS]
            command += [*LOSSES[run.loss], *VARIANTS[run.variant]]
            command += ["--imbalance", str(run.imbalance), "--seed", str(run.seed)]
        threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=threads)
    results = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    settings = {k: v for k, v in results["settings"].items() if k not in ("data_dir", "output")}
    test = {name: results["test"][name] for name in KEPT}
    return as_json(
        {
            "class_counts": results["class_counts"],
            "settings": settings,
            "calibration": results.get("calibration"),
            "test": {"full" if run.variant == "plain" else "chosen": test},
            "environment": environment(),
        }
    )
