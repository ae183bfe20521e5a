"""Runs with skip_errors whose images can no longer be read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_cases import DIGITS, QUIET, coloured_images, refused

pytest.importorskip("torchvision")

from elf_fast import data
from elf_fast.runs import opening
from elf_fast.training.processes import Processes
from elf_fast.training.progress import Totals
from elf_fast.training.trainer import Trainer, train
from elf_fast.training.unreadable import check_epoch

CPU = Processes(torch.device("cpu"))
pytestmark = pytest.mark.usefixtures("one_thread")
FLAGS = (
    "--model cifar_resnet8 --transforms small --img-size 16 --epochs 1 --batch-size 6 --workers 0 "
    "--no-log-tensorboard --skip-errors --device cpu"
).split()


@pytest.fixture
def folder(tmp_path) -> Path:
    return coloured_images(tmp_path / "data", {"train": (8, 4), "val": (3, 3)})


def config(folder: Path, **settings: object):
    return replace(
        DIGITS, dataset="folder", data_dir=str(folder), imbalance=None, transforms="small",
        img_size=16, batch_size=6, skip_errors=True, output=str(folder.parent / "run"), **settings,
    )  # fmt: skip


def spoil(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        path.write_bytes(b"no image")


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("train/*/*", "epoch 1: expected at least half of 12 images to be readable, got 0; the "),
        ("train/class0/[1-7].png", "expected at least half of 12 images to be readable, got 5; "),
        ("train/class1/*", "epoch 1: expected readable images of every class, got none of class1"),
        ("val/*/*", "evaluation: expected at least half of 6 images to be readable, got 0; the "),
        ("val/*/[12].png", "evaluation: expected at least half of 6 images to be readable, got 2"),
    ],
)
def test_a_run_that_reads_too_little_ends_with_an_error(pattern, message, folder, capsys):
    spoil(folder, pattern)
    said = refused(capsys, "train", "--data-dir", folder, "--output", folder.parent / "run", *FLAGS)
    assert message in said
    assert not (folder.parent / "run" / "metrics.json").exists()


def test_half_of_the_images_are_enough(folder):
    spoil(folder, "train/*/[0246].png")
    spoil(folder, "val/class1/*")
    results = train(config(folder), console=QUIET)
    assert results["history"][0]["skipped"] == 6 and results["validation"]["skipped"] == 3


def test_data_that_go_in_mid_run_stop_it_and_it_goes_on_when_they_are_back(folder, monkeypatch):
    settings = config(folder, epochs=2, checkpoint_steps=1)
    running = Trainer(settings, CPU, console=QUIET)
    gone = folder.with_name("gone")
    set_epoch = running.loader.set_epoch

    def unplug(epoch, start):
        set_epoch(epoch, start)
        if epoch == 1:
            folder.rename(gone)

    monkeypatch.setattr(running.loader, "set_epoch", unplug)
    with pytest.raises(data.DataError, match="^epoch 2: .*12 images to be readable, got 0; .*png$"):
        running.run()
    gone.rename(folder)
    again = Trainer(settings, CPU, console=QUIET)
    again.resume()
    results = again.run()
    assert [record["epoch"] for record in results["history"]] == [1, 2]
    assert results["history"][1]["skipped"] == 0


def test_a_step_without_images_is_no_checkpoint(folder):
    running = Trainer(config(folder, checkpoint_steps=1), CPU, console=QUIET)
    spoil(folder, "train/*/*")
    with pytest.raises(data.DataError):
        running.run()
    with pytest.raises(opening.CheckpointError, match="found none"):
        opening.read(Path(running.config.output))


def test_an_outage_of_most_images_is_no_checkpoint(folder):
    """Else the resumed epoch could never have enough images."""
    settings = config(folder, checkpoint_steps=1, epochs=1)
    running = Trainer(replace(settings, batch_size=3), CPU, console=QUIET)
    for path in running.loader.dataset.paths:
        Path(path).rename(path + ".gone")
    step, steps = running.step, []

    def back_for_the_last(group):
        steps.append(step(group))
        if len(steps) == 3:
            for path in running.loader.dataset.paths:
                Path(path + ".gone").rename(path)
        return steps[-1]

    running.step = back_for_the_last
    with pytest.raises(data.DataError):
        running.run()
    assert steps == [0, 0, 0, 3]
    assert not list((Path(settings.output) / "checkpoints").glob("step-*"))


class Peers(Processes):
    """Several processes: what the others answer to `gather`, in turn."""

    def __init__(self, *answers: list):
        super().__init__(torch.device("cpu"))
        object.__setattr__(self, "answers", iter(answers))

    def gather(self, value):
        return [value, *next(self.answers)]


def test_a_process_that_reads_nothing_stops_all(folder):
    """Even if it has less than half of the images."""
    loader = Trainer(config(folder), CPU, console=QUIET).loader
    totals = Totals([5, 3], skipped=4)
    names = ["class0", "class1"]
    peers = Peers([set(), {"a"}], [4, 0])
    with pytest.raises(data.DataError, match="got none in process 2 of 3"):
        check_epoch(1, totals, 4, loader, set(), names, peers)
    check_epoch(1, totals, None, loader, set(), names, Peers([{"a"}], [None]))
    paths = loader.dataset.paths
    both = Peers([set(paths[8:10])], [4])  # each process cannot read a part of class 1
    with pytest.raises(data.DataError, match="epoch 7: .* got none of class1; repair"):
        check_epoch(7, totals, 4, loader, set(paths[10:]), names, both)
