"""A resumed run ends with the result of an uninterrupted one."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import time
from dataclasses import replace
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

from elf_fast import cli
from elf_fast.runs import checkpoints, files
from elf_fast.runs.config import TrainConfig
from elf_fast.runs.opening import CHECKPOINTS
from elf_fast.training import schedule, trainer
from elf_fast.training.processes import Processes
from elf_fast.training.results import RESULTS
from elf_fast.training.trainer import train

CONFIG = TrainConfig(
    dataset="digits",
    imbalance=50.0,
    model="cifar_resnet8",
    loss="ldam",
    drw_epoch=1,
    train_thresholds=(0.3,),
    epochs=2,
    batch_size=128,
    lr=0.05,
    warmup_epochs=1,
    model_ema=True,
    model_ema_decay=0.9,
    checkpoint_steps=1,
    workers=0,
    log_tensorboard=False,
)
QUIET = Console(quiet=True)


def outcome(folder: Path):
    """All results of a finished run, except its speed."""
    results = json.loads((folder / RESULTS).read_text())
    for record in results["history"]:
        del record["images_per_second"]
    del results["settings"]["output"]
    last, refused = checkpoints.newest(folder / CHECKPOINTS)
    assert not refused
    tensors = {
        **{f"final {k}": v for k, v in files.load(folder / "model.safetensors")[0].items()},
        **{f"model {k}": v for k, v in last.weights.items()},
        **{f"average {k}": v for k, v in (last.average or {}).items()},
        "random": torch.stack([state["cpu"] for state in last.state["random"]]),
    }
    for i, state in last.state["optimizer"]["state"].items():
        tensors |= {f"optimizer {i} {k}": v for k, v in state.items() if torch.is_tensor(v)}
    return results, tensors


def assert_same_outcome(ours: Path, theirs: Path):
    (results, tensors), (expected, expected_tensors) = outcome(ours), outcome(theirs)
    assert results == expected
    assert tensors.keys() == expected_tensors.keys()
    different = [k for k, v in expected_tensors.items() if not torch.equal(tensors[k], v)]
    assert different == []


# Kills


def start(config: TrainConfig, ranks: int = 1):
    """Processes that train, and resume the run if there is one."""
    resume = (Path(config.output) / trainer.CONFIG).exists()
    return processes.start(ranks, train_quietly, config, resume)


def train_quietly(config: TrainConfig, resume: bool) -> None:
    train(config, resume=resume, console=QUIET)


def test_killed_twenty_times_a_run_ends_with_the_same_bits(tmp_path):
    """Each attempt is a process of its own that SIGKILL ends at a random moment: while it starts,
    trains, writes a checkpoint (one after every step) or evaluates."""

    def attempt(folder: Path, seconds: float = 60.0) -> bool:
        """Whether the run came to its end within `seconds` and was not killed."""
        (code,) = processes.wait(start(replace(CONFIG, output=str(folder))), seconds)
        assert code in (0, -9)
        return code == 0

    assert attempt(tmp_path / "whole")
    began = time.perf_counter()
    assert attempt(tmp_path / "again")
    duration = time.perf_counter() - began
    assert_same_outcome(tmp_path / "again", tmp_path / "whole")
    kills = finished = 0
    while kills < 20:
        folder = tmp_path / f"killed {finished}"
        if attempt(folder, seconds=random.uniform(0, duration)):
            finished += 1
            assert_same_outcome(folder, tmp_path / "whole")
        else:
            kills += 1
    folder = tmp_path / f"killed {finished}"
    assert attempt(folder)
    assert_same_outcome(folder, tmp_path / "whole")


# Two processes

TWO = replace(
    CONFIG,
    model="timm/test_resnet",
    model_kwargs={"drop_rate": 0.5},
    batch_size=32,
    grad_accum_steps=2,
    epochs=4,
)


def newest_step(folder: Path) -> int:
    found = (path.name.removeprefix("step-") for path in (folder / CHECKPOINTS).glob("step-*"))
    return max((int(step) for step in found if step.isdigit()), default=0)


def kill_after(step: int, config: TrainConfig) -> None:
    """Trains with two processes, and kills both when the checkpoint of a step exists."""
    started = start(config, ranks=2)
    deadline = time.monotonic() + 60
    while newest_step(Path(config.output)) < step:
        assert time.monotonic() < deadline and all(p.is_alive() for p in started)
        time.sleep(0.002)
    processes.kill(started)
    assert all(p.exitcode for p in started)


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory):
    """An uninterrupted run of TWO by two processes: 3 steps an epoch."""
    folder = tmp_path_factory.mktemp("whole of two")
    assert processes.wait(start(replace(TWO, output=str(folder)), ranks=2)) == [0, 0]
    return folder


def test_two_processes_killed_in_mid_run_end_with_the_same_bits(whole_of_two, tmp_path):
    config = replace(TWO, output=str(tmp_path))
    for step in (1, 2, 5):
        kill_after(step, config)
        assert not (tmp_path / RESULTS).exists()
    assert processes.wait(start(config, ranks=2)) == [0, 0]
    assert_same_outcome(tmp_path, whole_of_two)


def test_a_run_of_two_processes_goes_on_in_one_where_its_batches_divide_what_is_done(tmp_path):
    config = replace(TWO, output=str(tmp_path))
    kill_after(1, config)
    at = checkpoints.newest(tmp_path / CHECKPOINTS)[0].state["position"]
    assert at["epoch"] == 0 and 0 < at["samples"] <= 5 * 64
    with pytest.raises(files.CheckpointError, match=r"expected a .* = 96; resume with 64, or"):
        train(replace(config, batch_size=96), resume=True, console=QUIET)
    results = train(config, resume=True, console=QUIET)
    batches = [-(-(results["split"]["train"] - done) // 32) for done in (at["samples"], 0, 0, 0)]
    steps = itertools.accumulate((-(-n // 2) for n in batches), initial=at["step"])
    assert [record["step"] for record in results["history"]] == list(steps)[1:]
    per_epoch = -(-batches[-1] // 2)
    last = schedule.learning_rate(config, 4 * per_epoch - 1, per_epoch)
    assert results["history"][-1]["lr"] == last


def resume_from_own_folder(folder: Path, flags: list[str]) -> None:
    """Each rank has a folder of its own, and that of rank 1 holds no run."""
    rank = os.environ["RANK"]
    with open(folder / f"said by {rank}", "w") as said, contextlib.redirect_stderr(said):
        assert cli.main(["train", "--resume", str(folder / rank), *flags]) == 2


def test_processes_that_see_different_checkpoints_say_so(whole_of_two, tmp_path):
    shutil.copytree(whole_of_two, tmp_path / "0")
    flags = ["--config", str(whole_of_two / "config.yaml")]
    started = processes.start(2, resume_from_own_folder, tmp_path, flags)
    assert processes.wait(started) == [0, 0]
    for rank in range(2):
        said = (tmp_path / f"said by {rank}").read_text()
        assert re.search("expected all .* same checkpoint, got step-.*, none; the folder", said)


# Interruptions at a chosen step


class Interrupted(Exception):
    pass


def interrupt(monkeypatch, config: TrainConfig, step: int) -> None:
    """Trains until the checkpoint of a step is written."""
    save = checkpoints.save

    def save_and_stop(folder, at, *rest):
        save(folder, at, *rest)
        if at == step:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", save_and_stop)
        with pytest.raises(Interrupted):
            train(config, console=QUIET)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of CONFIG."""
    folder = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    train(replace(CONFIG, output=str(folder)), console=QUIET)
    return folder


@pytest.mark.parametrize("step", [1, 3, 5])  # in the middle and at the end of an epoch of 3
def test_an_interrupted_run_ends_like_a_whole_one(step, whole, tmp_path, monkeypatch):
    config = replace(CONFIG, output=str(tmp_path))
    interrupt(monkeypatch, config, step)
    train(config, resume=True, console=QUIET)
    assert_same_outcome(tmp_path, whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "timm/test_resnet", "model_kwargs": {"drop_rate": 0.5}, "model_ema": False},
        {"opt": "adamw", "lr": 1e-3, "grad_accum_steps": 2, "sampler": "progressive"},
        {"exits": (), "workers": 1, "clip_grad": 1.0, "amp": True, "loss": "focal"},
        # Without convolutions, which are slow in float16 on CPUs.
        {"model": "timm/test_vit", "model_kwargs": {"img_size": 16}, "exits": (), "amp": True,
         "amp_dtype": "float16", "clip_grad": 1.0},
    ],
    ids=["dropout", "adamw", "no exits", "float16"],
)  # fmt: skip
def test_what_else_a_run_has_comes_back(changes, tmp_path, monkeypatch):
    config = replace(CONFIG, **changes)
    train(replace(config, output=str(tmp_path / "whole")), console=QUIET)
    config = replace(config, output=str(tmp_path / "interrupted"))
    interrupt(monkeypatch, config, 1)
    torch.manual_seed(99)
    train(config, resume=True, console=QUIET)
    assert_same_outcome(tmp_path / "interrupted", tmp_path / "whole")


def test_a_run_goes_on_in_mid_epoch_with_other_batches_of_the_same_samples(tmp_path, monkeypatch):
    config = replace(CONFIG, output=str(tmp_path))
    interrupt(monkeypatch, config, 1)  # 128 of 300 samples
    with pytest.raises(files.CheckpointError, match="128 samples into an epoch.* = 96; resum"):
        train(replace(config, batch_size=96), resume=True, console=QUIET)
    results = train(replace(config, batch_size=32), resume=True, console=QUIET)
    samples = results["split"]["train"]
    steps = 1 + -(-(samples - 128) // 32)
    assert [record["step"] for record in results["history"]] == [steps, steps + -(-samples // 32)]


def test_a_checkpoint_of_other_settings_is_refused(tmp_path, monkeypatch):
    config = replace(CONFIG, output=str(tmp_path))
    interrupt(monkeypatch, config, 1)
    for change, message in (
        ({"model": "cifar_resnet14"}, "does not fit the network and optimiser"),
        ({"model_ema": False}, "expected model_ema True as in the checkpoint, got False"),
        ({"opt": "adamw"}, "expected opt sgd as in the checkpoint, got adamw"),
        ({"exits": ()}, r"does not fit .{,250} \.\.\.\)$"),
    ):
        with pytest.raises(files.CheckpointError, match=message):
            train(replace(config, **change), resume=True, console=QUIET)


@pytest.mark.parametrize(
    "changes",
    [
        {"thresholds": (0.3,), "train_thresholds": (0.7,), "weight_decay": 0.01, "momentum": 0.5},
        {"loss": "logit_adjusted", "tau": 3.0, "criterion": "entropy"},
        {"loss": "balanced_softmax", "imbalance": 10.0, "drw_epoch": None},
        {"amp": True, "amp_dtype": "float16"},
    ],
    ids=["exits and optimiser", "loss", "data", "precision"],
)
def test_settings_given_to_resume_replace_those_of_the_checkpoint(changes, tmp_path, monkeypatch):
    config = replace(CONFIG, loss="cross_entropy", output=str(tmp_path))
    interrupt(monkeypatch, config, 1)
    fresh, resumed = (
        trainer.Trainer(replace(config, **changes), Processes(torch.device("cpu")), console=QUIET)
        for _ in range(2)
    )
    resumed.resume()
    for ours, theirs in (
        (fresh.model, resumed.model),
        (fresh.learner.result, resumed.learner.result),
    ):
        expected, found = ours.state_dict(), theirs.state_dict()
        assert found.keys() == expected.keys()
        settled = [k for k in expected if not k.startswith(("stages.", "heads."))]
        assert "thresholds" in settled
        assert [k for k in settled if not torch.equal(found[k], expected[k])] == []
        assert not torch.equal(
            found["heads.0.classifier.weight"], expected["heads.0.classifier.weight"]
        )
    for group, saved in zip(
        fresh.learner.optimizer.param_groups, resumed.learner.optimizer.param_groups, strict=True
    ):
        assert saved["momentum"] == group["momentum"]
        assert saved["weight_decay"] == group["weight_decay"]
    assert len(resumed.learner.optimizer.state) == len(list(resumed.model.parameters()))


def test_epochs_that_are_done_are_not_undone(whole):
    fewer = replace(CONFIG, output=str(whole), epochs=1, drw_epoch=0)
    with pytest.raises(files.CheckpointError, match="epochs of at least 2, .* done, got 1"):
        train(fewer, resume=True, console=QUIET)


def test_a_run_is_not_overwritten(whole):
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(replace(CONFIG, output=str(whole)), console=QUIET)
    assert {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()} == before


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_its_checkpoints(tmp_path):
    config = replace(CONFIG, output=str(tmp_path), checkpoint_steps=None, checkpoint_epochs=2)
    config = replace(config, loss="cross_entropy", lr=1e30, warmup_epochs=0)
    with pytest.raises(trainer.NonFiniteError, match=r"the loss is (nan|inf) in step 2 \(epoch 1"):
        train(config, console=QUIET)
    assert not list((tmp_path / CHECKPOINTS).iterdir())
    config = replace(config, lr=3e38, weight_decay=1e3, checkpoint_steps=1)
    with pytest.raises(trainer.NonFiniteError, match="a weight is NaN or infinite after step 1 "):
        train(replace(config, output=str(tmp_path / "again")), console=QUIET)
    assert not list((tmp_path / "again" / CHECKPOINTS).iterdir())


# Damage


def cut_short(file: Path, other: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(file: Path, other: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def remove(file: Path, other: Path) -> None:
    file.unlink()


def swap(file: Path, other: Path) -> None:
    """Replaces a file by that of another checkpoint: undamaged, but it does not belong."""
    shutil.copyfile(other, file)


FILES = (checkpoints.WEIGHTS, checkpoints.AVERAGE, checkpoints.STATE, checkpoints.MANIFEST)


@pytest.fixture
def run(whole, tmp_path):
    """A copy of the whole run, its checkpoints oldest first."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    previous, last = sorted((folder / CHECKPOINTS).iterdir())
    return folder, previous, last


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, remove, swap])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_refused_and_the_previous_one_used(name, damage, run):
    folder, previous, last = run
    assert checkpoints.newest(folder / CHECKPOINTS)[0].path == last
    damage(last / name, previous / name)
    found, (error,) = checkpoints.newest(folder / CHECKPOINTS)
    assert found.path == previous
    named = FILES if (damage, name) == (swap, checkpoints.MANIFEST) else (name,)
    assert str(error).startswith(f"{last}: ") and any(n in str(error) for n in named)


def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_previous_one(run, whole, capsys):
    folder, previous, last = run
    flip_a_bit(last / checkpoints.STATE, previous)
    (folder / RESULTS).unlink()
    train(replace(CONFIG, output=str(folder)), resume=True)
    assert_same_outcome(folder, whole)
    said = capsys.readouterr().out
    assert f"refused: {last}: state.pt is damaged" in said and f"goes on from {previous}" in said
    names = [path.name for path in sorted((folder / CHECKPOINTS).iterdir())]
    assert names == [previous.name, last.name, f"{last.name}.damaged"]


def test_without_a_good_checkpoint_nothing_is_touched(run):
    folder, previous, last = run
    for path in (previous, last):
        remove(path / checkpoints.STATE, path)
    with pytest.raises(files.CheckpointError, match="expected a good checkpoint, got none"):
        train(replace(CONFIG, output=str(folder)), resume=True, console=QUIET)
    assert sorted((folder / CHECKPOINTS).iterdir()) == [previous, last]


@pytest.mark.parametrize("writes", range(4))
def test_a_save_that_fails_leaves_the_checkpoints_alone(writes, run, monkeypatch):
    """The disk is full at the first, second, ... file."""
    folder, previous, last = run
    saved = checkpoints.load(last)
    write, done = files.write, []

    def full(path, content):
        if len(done) == writes:
            raise OSError(28, "No space left on device")
        done.append(path)
        write(path, content)

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(OSError, match="No space"):
        checkpoints.save(last.parent, 11, saved.weights, saved.average, saved.state, saved.metadata)
    found, refused = checkpoints.newest(last.parent)
    assert found.path == last and not refused
    checkpoints.set_aside(last.parent, found)
    assert sorted(last.parent.iterdir()) == [previous, last]
