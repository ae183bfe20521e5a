"""Fine-tuning pretrained EfficientNet-Lite0 on CIFAR-10-LT, with exits and without: the recipe of
docs/training.md, three seeds.

    python -m benchmarks.accuracy.finetune --weights lite0.safetensors --images FOLDER --work WORK
    python -m benchmarks.accuracy.finetune --table

FOLDER holds CIFAR-10 as an image folder; `lite0.py` writes the weights. One epoch on images of
96x96, with the first blocks frozen, is what two shared CPU cores do in minutes. All runs have the
same images in the tail and in validation (data seed 0).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..environment import environment
from . import lite0, results
from .runs import Run
from .trial import FLOPS_LIMIT, KEPT, as_json

PATH = Path(__file__).resolve().parents[1] / "results" / "accuracy-finetune-cifar10.jsonl"
SEEDS = (0, 1, 2)
VARIANTS = {
    "plain": ["--no-exits"],
    "keep": ["--exits", "blocks.2", "blocks.4", "--conv-heads", "--max-flops", str(FLOPS_LIMIT)],
}
SETTINGS = f"""
    --imbalance 100 --validation-fraction 0.02 --img-size 96 --scale 0.35 1
    --mean {lite0.MEAN} {lite0.MEAN} {lite0.MEAN} --std {lite0.STD} {lite0.STD} {lite0.STD}
    --interpolation {lite0.INTERPOLATION} --model {lite0.MODEL} --freeze-backbone blocks.4
    --loss balanced_softmax --opt adamw --lr 0.001 --weight-decay 0.02
    --warmup-epochs 0.1 --epochs 1 --batch-size 32
    --workers 0 --channels-last --device cpu --no-log-tensorboard
""".split()


def table() -> list[Run]:
    return [
        Run(100, "balanced_softmax", "conv", variant, seed)
        for seed, variant in product(SEEDS, VARIANTS)
    ]


def perform(run: Run, weights: Path, images: Path, work: Path) -> dict[str, Any]:
    """Trains, chooses thresholds on validation and tests once, in a folder of its own under `work`.
    Returns the settings and results.

    Raises:
        subprocess.CalledProcessError: the training failed; the reason is on stderr.
    """
    folder = work / f"finetune-{run.variant}-{run.seed}"
    flags = [*SETTINGS, *VARIANTS[run.variant], "--seed", str(run.seed)]
    started = (folder / "config.yaml").exists()
    given = ["--resume", str(folder)] if started else [
        *flags, "--init-from", str(weights), "--data-dir", str(images), "--output", str(folder)
    ]  # fmt: skip
    command = [sys.executable, "-m", "elf_fast.cli", "train", *given]
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=threads)
    found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    places = ("data_dir", "output", "init_from")
    return as_json(
        {
            "class_counts": found["class_counts"],
            "settings": {k: v for k, v in found["settings"].items() if k not in places},
            "calibration": found.get("calibration"),
            "test": {name: found["test"][name] for name in KEPT},
            "train_images_per_second": found["history"][-1]["images_per_second"],
            "environment": environment(),
        }
    )


def summary(records: dict[Run, dict[str, Any]]) -> str:
    """The results as a table in Markdown: means and standard deviations over the seeds."""
    lines = [
        "| | seeds | overall | many | medium | FLOPs | left at each exit |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant, name in (("plain", "without exits"), ("keep", "with exits")):
        tests = [record["test"] for run, record in records.items() if run.variant == variant]
        if not tests:
            continue
        cells = [
            _spread([test[group] for test in tests])
            for group in ("overall", "many", "medium", "flops_share")
        ]
        exits = zip(*(test["exit_shares"] for test in tests), strict=True)
        shares = " / ".join(f"{100 * mean(shares):.0f}%" for shares in exits)
        lines.append(f"| {name} | {len(tests)} | {' | '.join(cells)} | {shares} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    deviation = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{deviation}%"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy.finetune", description=__doc__
    )
    parser.add_argument("--weights", type=Path, help="the file that lite0.py wrote")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="CIFAR-10 as image files")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="folder of the trainings")
    parser.add_argument("--output", type=Path, default=PATH, help="results file")
    parser.add_argument("--table", action="store_true", help="only print what the file says")
    options = parser.parse_args()
    given = [options.weights, options.images, options.work]
    if not options.table and None in given:
        parser.error("expected --weights, --images and --work, or --table")
    done = results.load(options.output)
    for run in [] if options.table else table():
        if run not in done:
            record = perform(run, *given)
            results.add(run, record, options.output)
            print(f"{run}: {100 * record['test']['overall']:.1f}%", flush=True)
    print(summary(results.load(options.output)), end="")


if __name__ == "__main__":
    main()
