"""What a run logs."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from run_cases import DIGITS, QUIET

from elf_fast.training.log import Log
from elf_fast.training.processes import Processes
from elf_fast.training.trainer import Trainer, train

CPU = Processes(torch.device("cpu"))

STATS = {"loss": 1.0, "accuracy": 0.5, "exit_shares": [0.25, 0.75], "images_per_second": 100.0}


def test_tensorboard_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    results = train(replace(DIGITS, output=str(tmp_path), log_tensorboard=True), console=QUIET)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (record,) = results["history"]
    for name in ("loss", "accuracy", "lr", "exit_shares/0", "validation/overall"):
        (event,) = events.Scalars(name)
        value = record
        for key in name.split("/"):
            value = value[int(key)] if key.isdigit() else value[key]
        assert event.step == record["step"] and event.value == pytest.approx(value)


@pytest.mark.parametrize(
    "seconds, expected",
    [
        (1.0, ["30%", "60%", "90%"]),  # every 30 s, which is more than 10% of the epoch
        (10.0, ["10%", "20%", "30%", "40%", "50%", "60%", "70%", "80%", "90%"]),
        (0.2, []),
    ],
)
def test_without_a_terminal_an_epoch_is_a_line_now_and_then(seconds, expected):
    now = 0.0
    shown = Console(file=io.StringIO(), width=200)
    with Log(DIGITS, shown, batches_per_epoch=100, clock=lambda: now) as log:
        for epoch in (0, 1):
            log.begin_epoch(epoch, 0)
            for batch in range(1, 101):
                now += seconds
                log.batch(batch, STATS)
    lines = shown.file.getvalue().splitlines()
    assert [line.split()[2] for line in lines] == 2 * expected
    stats = "loss 1.000  accuracy 50.0%  exits 25/75%  100 img/s"
    if lines:
        assert lines[0] == f"epoch 1/1  {expected[0]}  {stats}"
        assert lines[-1] == f"epoch 2/1  {expected[-1]}  {stats}"


def test_a_run_says_what_it_is_about_to_do(tmp_path):
    shown = Console(file=io.StringIO(), width=200)
    train(replace(DIGITS, output=str(tmp_path), thresholds=(0.8,)), console=shown)
    lines = shown.file.getvalue().splitlines()
    assert lines[0].startswith("data: 10 classes, images: ")
    assert lines[1] == "network: cifar_resnet8, 75,790 parameters, images 16x16, on cpu"
    assert lines[2] == (
        "exits: 3, the last at the end; leaving there costs 42/71/100% of the FLOPs without exits"
    )
    assert lines[3] == "training: 1 epochs of 5 steps"
    assert lines[4].startswith("--thresholds is only the start: calibration on validation chooses")
    assert lines[5].startswith("epoch 1/1")


@pytest.mark.parametrize("changes", [{"calibrate": False}, {"thresholds": (0.9,)}, {"exits": ()}])
def test_thresholds_that_stay_or_are_the_default_need_no_word(changes, tmp_path):
    shown = Console(file=io.StringIO(), width=200)
    given = {"thresholds": (0.8,), **changes}
    trainer = Trainer(replace(DIGITS, output=str(tmp_path), **given), CPU, console=shown)
    assert not any("--thresholds" in line for line in trainer._introduction())
