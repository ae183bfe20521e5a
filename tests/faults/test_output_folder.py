"""The folder of a run: one run at a time, and signals, deletions and failures in mid-run."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import torch
from run_cases import DIGITS, QUIET, refused

pytest.importorskip("safetensors")

from elf_fast import cli
from elf_fast.cli import doctor
from elf_fast.data import ImageLoader, loader
from elf_fast.runs import checkpoints, files, lock
from elf_fast.runs.opening import CHECKPOINTS
from elf_fast.training import trainer as trainers
from elf_fast.training.folder import RunFolder
from elf_fast.training.processes import Processes, Stopped
from elf_fast.training.results import Evaluator
from elf_fast.training.trainer import Trainer, train

CONFIG = replace(DIGITS, batch_size=160, device="cpu")  # two steps


@pytest.fixture(autouse=True)
def _one_thread(one_thread) -> None:
    """For every test of this file."""


@pytest.fixture(autouse=True)
def _hears_sighup() -> Iterator[None]:
    """Also where `nohup` makes the tests ignore it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


# The lock


def hold(folder: Path, ready: object) -> None:
    with lock.Lock(folder):
        ready.set()
        signal.pause()


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path):
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    holder = fork.Process(target=hold, args=(tmp_path, ready), daemon=True)
    holder.start()
    assert ready.wait(30)
    said = f"in use by a run on {socket.gethostname()}, process {holder.pid}, started 2"
    with pytest.raises(FileExistsError, match=said), lock.Lock(tmp_path):
        pass
    holder.kill()  # SIGKILL: nothing is cleaned up
    holder.join()
    assert (tmp_path / lock.NAME).exists()
    with lock.Lock(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_bytes())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_process_is_kept_from_itself_and_an_error_frees_the_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), lock.Lock(tmp_path):
        with pytest.raises(FileExistsError, match=f"process {os.getpid()}, "):
            lock.Lock(tmp_path / ".." / tmp_path.name).__enter__()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def left_by(folder: Path, host: str, pid: int) -> None:
    owner = {"host": host, "pid": pid, "started": "2026-01-02 03:04:05"}
    (folder / lock.NAME).write_text(json.dumps(owner))


def test_the_lock_of_another_machine_is_left_to_the_user(tmp_path):
    left_by(tmp_path, "node17", os.getpid())
    with pytest.raises(FileExistsError) as error, lock.Lock(tmp_path):
        pass
    assert "run on node17, " in str(error.value)
    assert f"if that run has ended, delete {tmp_path / lock.NAME}" in str(error.value)
    (tmp_path / lock.NAME).unlink()
    with lock.Lock(tmp_path):
        pass


@pytest.mark.parametrize("content", [b"", b"\0\0", b"[]", b'{"host": "a"}'])
def test_a_damaged_lock_that_nobody_holds_is_taken_over(content, tmp_path):
    (tmp_path / lock.NAME).write_bytes(content)
    with lock.Lock(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_bytes())["host"] == socket.gethostname()


def test_without_locks_of_the_kernel_the_process_that_is_named_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_lock", lambda descriptor: None)
    left_by(tmp_path, socket.gethostname(), os.getppid())
    with pytest.raises(FileExistsError, match=f"process {os.getppid()}"), lock.Lock(tmp_path):
        pass
    ended = multiprocessing.get_context("fork").Process(target=int)
    ended.start()
    ended.join()
    left_by(tmp_path, socket.gethostname(), ended.pid)
    with lock.Lock(tmp_path):
        pass


@pytest.mark.parametrize("resume", [False, True])
def test_train_names_the_run_that_holds_the_folder(resume, tmp_path, capsys):
    flags = "--dataset digits --model cifar_resnet8 --epochs 1 --workers 0 --no-log-tensorboard"
    left_by(tmp_path, "node3", 12)
    (tmp_path / "config.yaml").write_text("dataset: digits\n")
    where = ["--resume" if resume else "--output", str(tmp_path)]
    assert cli.main(["train", *flags.split(), *where]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"elf-fast: {tmp_path}: is in use by a run on node3, process 12, ")
    assert said.count("\n") == 1


# Whose folder it is


def fail(*arguments: object) -> None:
    raise RuntimeError("the first step fails")


def test_a_folder_without_a_checkpoint_is_free_again(tmp_path, monkeypatch):
    config = replace(CONFIG, output=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", fail)
        with pytest.raises(RuntimeError, match="the first step fails"):
            train(replace(config, lr=7.0), console=QUIET)
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "checkpoints"}
    assert not list((tmp_path / "checkpoints").iterdir())
    train(config, console=QUIET)
    assert "lr: 7.0" in (tmp_path / "config.previous.yaml").read_text()
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(config, console=QUIET)


@pytest.mark.parametrize("name", ["model.safetensors", "metrics.json", "checkpoints/step-00000001"])
def test_a_folder_with_results_of_a_run_is_not_free(name, tmp_path):
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(replace(CONFIG, output=str(tmp_path)), console=QUIET)
    assert not (tmp_path / "config.yaml").exists()


def test_only_what_a_killed_run_left_is_removed(tmp_path):
    own = {"config.yaml.9.partial", "config.previous.yaml.9.partial", "metrics.json.12.partial",
           "model.safetensors.3.partial", "model.previous.safetensors.3.partial"}  # fmt: skip
    theirs = {"movie.mkv.partial", "config.yaml.partial", "config.yaml.x.partial", "a.1.partial"}
    for name in own | theirs:
        (tmp_path / name).write_text("x")
    (tmp_path / "metrics.json.1.partial").mkdir()
    RunFolder(tmp_path, Processes(torch.device("cpu"))).claim(DIGITS, resumed=False)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == theirs | {"config.yaml", "checkpoints", "metrics.json.1.partial"}


def test_a_path_that_leads_round_in_a_circle_is_refused(tmp_path, capsys):
    (tmp_path / "loop").symlink_to("loop")
    flags = "--dataset digits --model cifar_resnet8 --workers 0 --no-log-tensorboard"
    said = refused(capsys, "train", *flags.split(), "--output", tmp_path / "loop")
    assert f"elf-fast: {tmp_path / 'loop'}: " in said


# Signals


def signalled(number: int, step: int):
    """`Trainer.step`, which gets a signal before a step, as if from outside."""
    make = Trainer.step

    def step_with_signal(self, group):
        if self.progress.step == step - 1:
            os.kill(os.getpid(), number)
        return make(self, group)

    return step_with_signal


def weights(folder: Path) -> dict:
    return files.load(folder / checkpoints.WEIGHTS)[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    train(replace(CONFIG, output=str(folder)), console=QUIET)
    return folder


@pytest.mark.parametrize("name, when", [("SIGTERM", 2), ("SIGUSR1", 1), ("SIGHUP", "validation")])
def test_a_signal_writes_a_checkpoint_and_the_run_ends_alike(
    name, when, whole, tmp_path, monkeypatch
):
    number, config = signal.Signals[name], replace(CONFIG, output=str(tmp_path))
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        if when == "validation":
            evaluate = Evaluator.metrics
            patch.setattr(
                Evaluator, "metrics",
                lambda *arguments: os.kill(os.getpid(), number) or evaluate(*arguments),
            )  # fmt: skip
        else:
            patch.setattr(Trainer, "step", signalled(number, when))
        with pytest.raises(Stopped) as stopped:
            train(config, console=QUIET)
    assert stopped.value.code == 128 + number and signal.getsignal(number) is before
    assert not (tmp_path / checkpoints.WEIGHTS).exists() and not (tmp_path / lock.NAME).exists()
    (saved,) = (tmp_path / CHECKPOINTS).iterdir()
    assert saved.name == f"step-{2 if when == 'validation' else when - 1:08}"
    results = train(config, resume=True, console=QUIET)
    assert "validation" in results["history"][0]
    for key, value in weights(whole).items():
        assert torch.equal(weights(tmp_path)[key], value), key


def test_the_command_ends_with_the_signals_status(tmp_path, monkeypatch, capsys):
    flags = "--dataset digits --model cifar_resnet8 --workers 0 --no-log-tensorboard --epochs 2"
    monkeypatch.setattr(Trainer, "step", signalled(signal.SIGTERM, 1))
    folder = tmp_path / "m[/b][lr=0.1]:x:"  # which rich would read as marks
    how_to_go_on = f"its checkpoint is written: go on with it by --resume {folder}\n"
    assert cli.main(["train", *flags.split(), "--output", str(folder)]) == 143
    shown = capsys.readouterr()
    assert f"SIGTERM: the run stops after step 0; {how_to_go_on}" in shown.out
    assert shown.err == ""
    assert cli.main(["train", "--resume", str(folder)]) == 143
    assert f"goes on from {folder / CHECKPOINTS / 'step-00000000'}\n" in capsys.readouterr().out


def test_a_run_goes_on_when_the_reader_of_its_lines_has_ended(tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    flags = "--dataset digits --model cifar_resnet8 --workers 0 --no-log-tensorboard --epochs 1"
    with open(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main(["train", *flags.split(), "--output", str(tmp_path)]) == 0
    assert (tmp_path / "metrics.json").exists()


def test_signals_end_no_worker_and_the_end_of_their_parent_does():
    """Queues send signals to all processes of a job."""
    batches = iter(ImageLoader([(torch.zeros(1), 0)] * 64, 1, workers=1))
    next(batches)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        os.kill(worker.pid, number)
    for _ in range(20):  # more than the worker has loaded ahead
        next(batches)
    assert worker.is_alive()
    loader._end_workers()  # as at exit
    worker.join(20)
    assert worker.exitcode == 0


def train_with_a_signal_to_one(folder: Path) -> None:
    """Trains in several processes, of which the second gets SIGTERM in its first step. The first is
    slow to write the checkpoint."""
    if os.environ["RANK"] == "1":
        Trainer.step = signalled(signal.SIGTERM, 1)
    save = checkpoints.save
    checkpoints.save = lambda *arguments: time.sleep(0.3) or save(*arguments)
    flags = "--dataset digits --model cifar_resnet8 --workers 0 --no-log-tensorboard --epochs 9"
    status = cli.main(["train", *flags.split(), "--device", "cpu", "--output", str(folder)])
    assert list((folder / CHECKPOINTS).glob("step-????????")), "left before the checkpoint"
    sys.exit(status)


def test_processes_leave_together_where_one_gets_a_signal(tmp_path):
    started = processes.start(2, train_with_a_signal_to_one, tmp_path)
    assert processes.wait(started) == [143, 143]
    (saved,) = (tmp_path / CHECKPOINTS).iterdir()
    assert len(checkpoints.load(saved).state["random"]) == 2


def interrupted_twice(said: Path) -> None:
    """A command that Ctrl-C interrupts, and again while it cleans up."""

    def run(arguments: object) -> int:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
        return 0

    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    doctor.run = run
    sys.exit(cli.main(["doctor"]))


def test_ctrl_c_twice_shows_no_traceback(tmp_path):
    started = processes.start(1, interrupted_twice, tmp_path / "said")
    assert processes.wait(started) == [130]
    assert "Traceback" not in (tmp_path / "said").read_text()


# File systems


@pytest.mark.parametrize("code", ["EINVAL", "ENOTSUP", "EOPNOTSUPP", "EIO"])
def test_only_a_file_system_that_cannot_flush_is_excused(code, tmp_path, monkeypatch):
    def fsync(descriptor: int) -> None:
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(files.os, "fsync", fsync)
    if code == "EIO":
        with pytest.raises(OSError, match="a.txt"):
            files.write(tmp_path / "a.txt", b"a")
        return
    files.write(tmp_path / "a.txt", b"a")
    files.sync_folder(tmp_path)
    assert (tmp_path / "a.txt").read_bytes() == b"a"


@pytest.mark.parametrize(
    "replaced, log",
    [(False, "--no-log-tensorboard"), (True, "--no-log-tensorboard"), (False, "--log-tensorboard")],
    ids=["deleted", "deleted and made again", "deleted below TensorBoard"],
)
def test_a_run_whose_folder_is_deleted_says_so_and_does_not_bring_it_back(
    replaced, log, tmp_path, monkeypatch, capsys
):
    make, folder = Trainer.step, tmp_path / "run"

    def step(self, group):
        shutil.rmtree(folder, ignore_errors=True)
        if replaced:
            folder.mkdir()
        return make(self, group)

    monkeypatch.setattr(trainers.Trainer, "step", step)
    flags = f"--dataset digits --model cifar_resnet8 --workers 0 {log} --epochs 1"
    assert cli.main(["train", *flags.split(), "--output", str(folder)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"elf-fast: {folder}: the run stops: its folder was deleted or moved")
    assert said.count("\n") == 1
    assert not folder.exists() or list(folder.iterdir()) == []


def test_a_lock_of_a_dead_container_on_this_host_is_taken_over(tmp_path, monkeypatch):
    with lock.Lock(tmp_path):
        left = (tmp_path / lock.NAME).read_text()
    (tmp_path / lock.NAME).write_text(left)  # as after SIGKILL
    monkeypatch.setattr(socket, "gethostname", lambda: "another-container")
    with lock.Lock(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text())["host"] == "another-container"


def test_a_lock_that_another_run_has_written_over_stops_the_run(tmp_path):
    """As where locks do not work between machines."""
    with lock.Lock(tmp_path) as held:
        held.check()
        left_by(tmp_path, "elsewhere", 1)
        with pytest.raises(FileNotFoundError, match="taken by another run"):
            held.check()
    assert (tmp_path / lock.NAME).exists()


def test_the_settings_that_a_user_put_into_the_folder_are_kept(tmp_path):
    own = RunFolder(tmp_path, Processes(torch.device("cpu")))
    (tmp_path / "config.yaml").write_text("# by hand")
    for _ in range(3):
        own.claim(DIGITS, resumed=False)
    assert (tmp_path / "config.previous.yaml").read_text() == "# by hand"
