"""The demo: trains the network without exits and ELF on long-tailed digits, chooses thresholds on
validation, and compares both once on the test set."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from .. import __version__
from ..console import LastingConsole, say
from ..data.digits import DigitSplits, long_tailed_digits
from ..flops import Flops, count_flops
from ..losses import BalancedSoftmaxLoss
from ..metrics import ELFMetrics
from ..modules import ELF
from ..page.evaluating import evaluate as evaluate_for_page
from ..policy import one_number
from ..policy.exit_table import exit_table
from ..runs import demo_network as network
from ..runs import files, opening
from ..runs.checkpoints import WEIGHTS
from ..runs.datasets import digit_preprocessing
from ..runs.description import CONFIG, DEMO, Facts, entries, write_weights
from . import page, summary, throughput
from .loop import EpochStats, Schedule, batches, predict, train

IMBALANCE = 50.0
SPLIT_SEED = 0
TRAIN_THRESHOLD = 0.9
LOSS = "balanced softmax"
# Chosen on data outside the test set, with another split for each of 10 seeds. Compared with
# keeping the samples that left, dropping them lowered the accuracy with exits off by 0.7 points
# (standard deviation 0.7); at the chosen thresholds the difference, 0.4 (1.0), was noise. With
# cross-entropy, dropping them cost 6 points (two seeds). A training threshold of 0.7 was worse than
# 0.9 in all of three seeds.
DROP_EXITED = False


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limits torch to one CPU thread inside the block. Batches of 64 small images gain little from
    more. A second thread that waits for a busy core makes them ten times slower, and the numbers
    would depend on how many threads there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Trained(NamedTuple):
    """The networks of one seed, ELF with its chosen threshold, and their entry in the results."""

    without_exits: ELF
    elf: ELF
    entry: dict[str, Any]


def build(kind: str, class_counts: list[int]) -> ELF:
    """An untrained network: kind "elf" or "without_exits". Its weights depend on torch's seed."""
    loss: nn.Module = BalancedSoftmaxLoss(class_counts)
    if kind == "without_exits":
        return network.without_exits(len(class_counts), exit_loss=loss)
    return network.with_exits(
        len(class_counts),
        exit_loss=loss,
        thresholds=TRAIN_THRESHOLD,
        train_thresholds=TRAIN_THRESHOLD,
        drop_exited=DROP_EXITED,
    )


@one_thread()
def run(output: Path, *, seeds: int = 3, epochs: int = 40, console: Console | None = None) -> dict:
    """Trains, evaluates and writes report.html, results.json and model.safetensors (ELF of the
    first seed) into `output`; returns the results."""
    console = console or LastingConsole()
    start = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    data = long_tailed_digits(IMBALANCE, seed=SPLIT_SEED)
    schedule = Schedule(epochs=epochs)
    with _progress(console) as progress:
        trained = [_train_seed(seed, data, schedule, progress) for seed in range(seeds)]
    first = trained[0]
    with console.status("measuring images per second"):
        speed = throughput.measure(first.elf, first.without_exits, data.test.images)
    results = {
        "versions": {"elf_fast": __version__, "torch": torch.__version__},
        "settings": {
            **asdict(schedule),
            "seeds": seeds,
            "imbalance": IMBALANCE,
            "split_seed": SPLIT_SEED,
            "loss_name": LOSS,
            "drop_exited": DROP_EXITED,
            "train_threshold": TRAIN_THRESHOLD,
            "threads": torch.get_num_threads(),
        },
        "class_counts": data.class_counts,
        "split": {name: len(getattr(data, name)) for name in ("train", "validation", "test")},
        "runs": [t.entry for t in trained],
        "throughput": speed,
        "seconds": time.perf_counter() - start,
    }
    _write(output, results, first, data)
    _print(console, output, results)
    return results


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("{task.fields[stats]}"),
        TimeElapsedColumn(),
        console=console,
    )


def _train_seed(seed: int, data: DigitSplits, schedule: Schedule, progress: Progress) -> Trained:
    models, seconds = {}, {}
    for kind, name in (("without_exits", "no exits"), ("elf", "ELF")):
        task = progress.add_task(f"seed {seed}, {name:8}", total=schedule.epochs, stats="")

        def show(stats: EpochStats, task=task) -> None:
            text = f"loss {stats.loss:5.2f}  accuracy {100 * stats.accuracy:3.0f}%"
            if len(stats.exit_shares) > 1:
                text += "  exits " + "/".join(f"{100 * s:.0f}" for s in stats.exit_shares) + "%"
            progress.update(task, advance=1, stats=text)

        torch.manual_seed(seed)
        model = build(kind, data.class_counts)
        start = time.perf_counter()
        train(model, data.train, schedule, seed=seed, on_epoch=show)
        seconds[kind] = time.perf_counter() - start
        models[kind] = model
    return _assess(seed, models["without_exits"], models["elf"], data, seconds)


def _assess(
    seed: int, without_exits: ELF, elf: ELF, data: DigitSplits, seconds: dict[str, float]
) -> Trained:
    """Chooses the threshold on validation and evaluates both networks on the test set."""
    flops = count_flops(elf, data.test.images[:1])
    full = flops.without_exits
    points = one_number.sweep(exit_table(elf, batches(data.validation)), flops)
    chosen = one_number.choose(points)
    test = {
        "without_exits": evaluate(
            without_exits, data, count_flops(without_exits, data.test.images[:1])
        )
    }
    elf.thresholds.fill_(math.inf)
    test["never"] = evaluate(elf, data, flops)
    one_number.set_threshold(elf, chosen.threshold)
    test["elf"] = evaluate(elf, data, flops)
    curve = one_number.sweep(exit_table(elf, batches(data.test)), flops)
    entry = {
        "seed": seed,
        "threshold": _finite(chosen.threshold),
        "validation": {"chosen": chosen.accuracy, "exits_off": points[-1].accuracy},
        "test": test,
        "curve": [
            {
                "threshold": _finite(p.threshold),
                "accuracy": p.accuracy,
                "flops_share": p.flops / full,
            }
            for p in curve
        ],
        "seconds": seconds,
    }
    return Trained(without_exits, elf, entry)


def evaluate(model: ELF, data: DigitSplits, flops: Flops) -> dict[str, Any]:
    """The metrics of `model` on the test set."""
    metrics = ELFMetrics(data.class_counts, flops)
    metrics.update(predict(model, data.test.images), data.test.targets)
    return metrics.compute()


def evaluation(
    path: Path, weights: dict[str, Tensor], metadata: dict[str, Any]
) -> opening.Evaluation:
    """What is needed to evaluate the weights and metadata that the demo wrote and `opening.read`
    returned.

    Raises:
        files.CheckpointError: weights or metadata do not fit this version's network or split.
    """
    missing = {"class_counts", "imbalance", "seed", "split_seed"} - set(metadata)
    if missing:
        raise files.CheckpointError(
            f"{path}: expected weights of the digits demo, with {', '.join(sorted(missing))} in "
            f"their metadata, got {', '.join(sorted(metadata))}"
        )
    data = long_tailed_digits(metadata["imbalance"], seed=metadata["split_seed"])
    if data.class_counts != metadata["class_counts"]:
        raise files.CheckpointError(
            f"{path}: expected class_counts {data.class_counts} as in this version's split, got "
            f"{metadata['class_counts']}"
        )
    model = build("elf", data.class_counts)
    opening.load_weights(model, weights, path)
    return assessed(model, data, metadata["seed"])


def assessed(model: ELF, data: DigitSplits, seed: int) -> opening.Evaluation:
    """A network of the demo and the test set."""
    return opening.Evaluation(
        "test", seed, model, data.test, batches(data.test), data.class_names, data.class_counts,
        count_flops(model, data.test.images[:1]), one_thread,
    )  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _write(output: Path, results: dict[str, Any], first: Trained, data: DigitSplits) -> None:
    names, counts = tuple(data.class_names), tuple(data.class_counts)
    metadata = {
        "network": DEMO,
        **entries(Facts(names, counts, digit_preprocessing(channels=1))),
        "imbalance": IMBALANCE,
        "split_seed": SPLIT_SEED,
        "seed": first.entry["seed"],
        "loss_name": LOSS,
    }
    write_weights(output, first.elf.state_dict(), metadata, WEIGHTS)
    evaluated = evaluate_for_page("ELF", assessed(first.elf, data, first.entry["seed"]))
    files.write(output / "report.html", page.html(results, evaluated).encode())
    (output / "results.json").write_text(
        json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )


def _print(console: Console, output: Path, results: dict[str, Any]) -> None:
    from rich.table import Table

    headings, rows = summary.table(results)
    table = Table()
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i == 0 else "right", no_wrap=i > 0)
    for label, cells in rows:
        table.add_row(label, *cells)
    console.print(table)
    for line in summary.sentences(results):
        console.print(f"- {line}", highlight=False)
    console.print(f"\nWritten in {results['seconds']:.0f} s:", highlight=False)
    for name in ("report.html", "results.json", WEIGHTS, CONFIG):
        say(console, f"  {output / name}")
