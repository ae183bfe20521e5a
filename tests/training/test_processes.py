"""Training runs of two processes that have unequally many images, since some cannot be read."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")
pytest.importorskip("rich")
pytest.importorskip("timm")
pytest.importorskip("torchmetrics")
pytest.importorskip("torchvision")
pytest.importorskip("yaml")

import processes
from rich.console import Console
from run_cases import coloured_images

from elf_fast import cli, data
from elf_fast.runs import files
from elf_fast.runs.config import TrainConfig
from elf_fast.samplers import InstanceSampler
from elf_fast.training.processes import joined
from elf_fast.training.trainer import Trainer, train

CONFIG = TrainConfig(
    dataset="digits",
    model="cifar_resnet8",
    train_thresholds=(0.3,),
    epochs=2,
    batch_size=4,
    lr=0.05,
    warmup_epochs=0,
    workers=0,
    skip_errors=True,
    device="cpu",
    log_tensorboard=False,
)
EXITS = pytest.mark.parametrize("exits", [None, ()], ids=["exits", "no exits"])


# Steps

#: For each rank, the samples in the two batches of every step. In turn: either rank has an empty
#: batch; unequal batches; a step without samples; a last batch without samples.
BATCHES = (((8, 0), (3, 8), (0, 0), (2, 0)), ((0, 5), (8, 1), (0, 0), (4, 0)))


def steps(batches: tuple, config: TrainConfig, file: Path) -> None:
    """Makes steps on this rank's batches (one process: on all), and saves the results."""
    torch.set_default_dtype(torch.float64)
    images = torch.randn(39, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(39) % 10
    with joined("cpu") as joined_processes:
        running = Trainer(config, joined_processes, console=Console(quiet=True))
        samples, sizes = iter(range(39)), []
        for step in zip(*batches, strict=True):
            group = []
            for shares in zip(*step, strict=True):
                drawn = [[next(samples) for _ in range(share)] for share in shares]
                own = (
                    drawn[joined_processes.rank]
                    if joined_processes.world_size > 1
                    else list(chain(*drawn))
                )
                group.append((images[own], targets[own]))
            sizes.append(running.step(group))
        totals = running.progress.totals.over(joined_processes)
        result = {
            "sizes": sizes,
            "step": running.progress.step,
            "loss": totals.loss,
            "counts": {**asdict(totals), "loss": None},
            "weights": {name: w.detach() for name, w in running.model.named_parameters()},
        }
        torch.save(result, f"{file}.{joined_processes.rank}")


@EXITS
def test_steps_of_ranks_with_unequal_batches_are_those_of_one_process(exits, tmp_path):
    # A network without batch statistics, whose gradient is a mean over samples, at one rate.
    config = replace(CONFIG, exits=exits, model="timm/test_nfnet", sched="step")
    for ranks, name in ((1, "one"), (2, "two")):
        started = processes.start(ranks, steps, BATCHES, config, tmp_path / name)
        assert processes.wait(started) == [0] * ranks
    one, *two = (torch.load(tmp_path / name) for name in ("one.0", "two.0", "two.1"))
    assert one["sizes"] == [13, 20, 0, 6] and one["step"] == 4
    assert sum(one["counts"]["exits"]) == 39
    for result in two:
        for key in ("sizes", "step", "counts"):
            assert result[key] == one[key]
        assert result["loss"] == pytest.approx(one["loss"], rel=1e-9)
        for name, weight in one["weights"].items():
            torch.testing.assert_close(result["weights"][name], weight, rtol=1e-7, atol=1e-9)


# From end to end


@pytest.fixture
def folder(tmp_path):
    """32 images to train on, 8 for validation and 8 for the test, in two classes."""
    return coloured_images(tmp_path, {"train": (16, 16), "val": (4, 4), "test": (4, 4)})


def spoil(paths: list[str]) -> list[str]:
    for path in paths:
        Path(path).write_bytes(b"no image")
    return paths


def train_and_tell(config: TrainConfig, said: Path) -> None:
    with open(said, "a") as file:
        train(config, console=Console(file=file))


@EXITS
def test_ranks_stay_in_step_where_one_cannot_read_a_batch(exits, folder, tmp_path):
    splits = data.image_folder(folder)
    order = list(InstanceSampler(splits.train.targets, num_replicas=2, rank=1))
    bad = spoil([splits.train.paths[i] for i in order[4:8]])  # the whole second batch
    bad += spoil(splits.validation.paths[1::2])  # all of its share of validation
    bad += spoil(splits.test.paths[:1])
    config = replace(
        CONFIG, dataset="folder", data_dir=str(folder), transforms="small", img_size=16,
        exits=exits, output=str(tmp_path / "run"),
    )  # fmt: skip
    codes = processes.wait(processes.start(2, train_and_tell, config, tmp_path / "said"))
    assert codes == [0, 0]
    results = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for epoch, record in enumerate(results["history"], start=1):
        assert (record["step"], record["skipped"]) == (4 * epoch, 4)
        assert record["validation"]["samples"] == record["validation"]["skipped"] == 4
    assert (results["test"]["samples"], results["test"]["skipped"]) == (7, 1)
    assert ("calibration" in results) == (exits is None)
    weights, _ = files.load(tmp_path / "run" / "model.safetensors")
    assert all(w.isfinite().all() for w in weights.values() if w.is_floating_point())
    said = (tmp_path / "said").read_text()
    named = [line for line in said.splitlines() if line.startswith("left out, cannot be read: ")]
    assert sorted(line.split(": ")[1] for line in named) == sorted(bad)


@pytest.mark.parametrize("interval", [1, 2], ids=["after the epoch", "at the end"])
def test_where_nothing_can_be_read_there_is_nothing_to_evaluate_on(
    interval, folder, tmp_path, capsys
):
    bad = spoil(data.image_folder(folder).validation.paths)
    flags = "--model cifar_resnet8 --transforms small --img-size 16 --epochs 1 --workers 0 "
    flags += f"--no-log-tensorboard --skip-errors --data-dir {folder} --output {tmp_path / 'run'}"
    flags += f" --val-interval {interval}"
    assert cli.main(["train", *flags.split()]) == 2
    shown, said = capsys.readouterr()
    assert all(f"left out, cannot be read: {path}" in shown for path in bad)
    message = "evaluation: expected at least half of 8 images to be readable, got 0; the others"
    assert said.startswith(f"elf-fast: {message} cannot be read, such as ")
