"""`elf-fast train`: a run from end to end, and errors that the user can correct."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from run_cases import FLAGS, printed

from elf_fast import cli
from elf_fast.runs import files, plain
from elf_fast.training.trainer import Trainer


def test_a_run_learns_and_leaves_its_files(run):
    assert {p.name for p in run.iterdir()} == {
        "config.yaml", "metrics.json", "model.safetensors", "policy.json", "checkpoints",
        "config.json", "README.md",
    }  # fmt: skip
    results = json.loads((run / "metrics.json").read_text())
    assert results["class_counts"] == [60, 24, 10]
    assert results["split"] == {"train": 94, "validation": 24, "test": 24}
    history = results["history"]
    assert [record["epoch"] for record in history] == [1, 2, 3, 4]
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert history[-1]["accuracy"] > 0.9 and results["test"]["overall"] > 0.9
    assert all(sum(record["exit_shares"]) == pytest.approx(1) for record in history)
    assert {"overall", "few", "flops_share"} < set(history[0]["validation"])
    assert "per_class" in results["validation"] and "per_class" not in history[0]["validation"]
    assert results["test"]["samples"] == 24
    calibration = results["calibration"]
    assert calibration["accuracy"] >= calibration["accuracy_exits_off"]
    assert results["validation"]["overall"] == pytest.approx(calibration["accuracy"])
    assert results["validation"]["flops_share"] == pytest.approx(calibration["flops_share"])


def test_the_resolved_settings_are_saved_and_flags_go_before_the_file(run):
    saved = plain.from_dict(plain.load_yaml(run / "config.yaml"))
    assert (saved.epochs, saved.seed, saved.momentum) == (4, 3, 0.9)
    assert json.loads((run / "metrics.json").read_text())["settings"] == plain.to_dict(saved)


def test_the_weights_hold_thresholds_classes_and_settings(run):
    state, metadata = files.load(run / "model.safetensors")
    results = json.loads((run / "metrics.json").read_text())
    threshold = results["calibration"]["threshold"]
    threshold = math.inf if threshold is None else threshold
    assert state["thresholds"].tolist() == pytest.approx([threshold] * 2)
    assert state["train_thresholds"].tolist() == pytest.approx([0.8] * 2)
    assert metadata["class_counts"] == [60, 24, 10]
    assert metadata["class_names"] == ["class0", "class1", "class2"]


def test_a_finished_run_resumes_to_the_same_results(run, capsys):
    before = json.loads((run / "metrics.json").read_text())
    assert f"goes on from {run}" in printed(capsys, "train", "--resume", run).replace("\n", "")
    assert json.loads((run / "metrics.json").read_text()) == before


def test_a_finished_run_is_calibrated_anew_for_fewer_flops(folder, tmp_path, capsys):
    def calibrated(*arguments: object) -> dict:
        printed(capsys, "train", *arguments)
        return json.loads((tmp_path / "run" / "metrics.json").read_text())

    data = ["--data-dir", folder, "--output", tmp_path / "run"]
    free = calibrated(*data, *FLAGS, "--exit-weights", 0, 0, 1, "--train-thresholds", "inf")
    assert free["validation"]["flops_share"] > 0.9  # only the last exit has learnt
    limited = calibrated("--resume", tmp_path / "run", "--max-flops", 0.6)
    assert limited["validation"]["flops_share"] <= 0.6
    assert limited["validation"]["overall"] < free["validation"]["overall"]
    assert limited["history"] == free["history"]
    again = calibrated("--resume", tmp_path / "run", "--max-flops", "none")
    assert again["validation"] == free["validation"] and again["settings"]["max_flops"] is None


def test_resuming_a_run_that_is_not_there_yet_starts_it(tmp_path, capsys):
    flags = "--dataset digits --epochs 1 --model cifar_resnet8 --workers 0 --no-log-tensorboard"
    command = ["train", "--resume", tmp_path / "new", *flags.split()]
    said = printed(capsys, *command)
    assert f"{tmp_path / 'new'} holds no checkpoint: a new run starts there" in said
    assert "goes on" not in said
    assert "goes on from" in printed(capsys, *command)


@pytest.mark.parametrize("steps", [3, 12])
def test_ctrl_c_says_how_to_go_on(steps, tmp_path, monkeypatch, capsys):
    """In the first epoch of 9 steps, before there is a checkpoint, and in the second."""
    make, output = Trainer.step, tmp_path / "my run"

    def step(self, group):
        if self.progress.step == steps:
            raise KeyboardInterrupt
        return make(self, group)

    monkeypatch.setattr(Trainer, "step", step)
    flags = "--dataset digits --epochs 2 --model cifar_resnet8 --workers 0 --no-log-tensorboard"
    assert cli.main(["train", *flags.split(), "--output", str(output)]) == 130
    how = f"to go on from the newest checkpoint: elf-fast train --resume '{output}'"
    if steps == 3:
        how = "there is no checkpoint yet: the same command starts again"
    assert capsys.readouterr().err == f"elf-fast: stopped; {how}\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--resume", "nowhere"], "--resume: expected the folder of a run, got nowhere"),
        (["--data-dir", "nowhere"], "--data-dir: expected a folder with one subfolder per class"),
        (["--dataset", "digits", "--model", "cifar_resnet9"], "--model: depth: expected 6n + 2"),
        (["--dataset", "digits", "--img-size", "8"], "--img-size: expected None for digits, got 8"),
        (["--epochs", "x", "--dataset", "digits"], "--epochs: expected an integer, got 'x'"),
        (["-c", "nowhere.yaml"], "nowhere.yaml: No such file"),
        (
            ["--dataset", "iNaturalist-2018", "--data-dir", "x"],
            "x/iNaturalist18_train.txt: expected a list of images, got no file; x/iNat",
        ),
        (
            ["--dataset", "digits", "--model", "cifar_resnet8", "--exits", "layer9"],
            '--exits: no module named "layer9" in CifarResNet',
        ),
        (
            [
                "--dataset",
                "digits",
                "--model",
                "vit_tiny_patch16_224",
                "--conv-heads",
                "--model-kwargs",
                "img_size=16",
            ],
            "--conv-heads: expected features [N, D, H, W], got [2, 2, 192]",
        ),
        (
            ["--dataset", "digits", "--model", "resnet18", "--model-kwargs", "checkpoint_path=a"],
            "--model: expected weights of resnet18 with {'checkpoint_path': 'a'} that can be "
            "loaded, got FileNotFoundError\n",
        ),
        (["--dataset", "digits", "--device", "gpu"], "--device: expected cpu, cuda or another"),
        (["--dataset", "digits", "--device", "cuda:99"], "GPUs that torch can use, got 'cuda:99'"),
        (["--dataset", "digits", "--torchcompile", "c"], "--torchcompile: expected a backend of"),
        (["--dataset", "digits", "--opt", "sgdd"], "--opt: expected an optimiser that timm can"),
        (
            ["--dataset", "digits", "--model", "cifar_resnet8", "--model-kwargs", "a=1"],
            "--model-kwargs: expected options of cifar_resnet8, got {'a': 1}",
        ),
        (["--resume", "a", "--output", "b"], "--output: expected a or none with --resume a"),
    ],
)
def test_what_the_user_can_put_right_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name, flag, cure",
    [
        ("wandb", ["--log-wandb", "--no-log-tensorboard"], "wandb"),
        ("tensorboard", [], 'tensorboard (or pip install ".[train]" in the source folder)'),
    ],
)
def test_a_log_that_is_missing_stops_a_run_before_it_starts(
    name, flag, cure, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--dataset", "digits", "--model", "cifar_resnet8", *flag]) == 2
    assert capsys.readouterr().err == f"elf-fast: {name} is not installed: pip install {cure}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_limit_of_flops_needs_a_threshold_to_choose(folder, tmp_path, capsys):
    shutil.copytree(folder / "train", tmp_path / "data")
    flags = ["train", "--data-dir", str(tmp_path / "data"), "--output", str(tmp_path / "run")]
    assert cli.main([*flags, *FLAGS, "--max-flops", "0.5"]) == 2
    assert "--max-flops: expected a validation part" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_small_transforms_name_images_of_another_size(folder, tmp_path, capsys):
    flags = ["--data-dir", str(folder), "--output", str(tmp_path / "run"), *FLAGS]
    assert cli.main(["train", *flags, "--img-size", "8"]) == 2
    said = capsys.readouterr().err
    assert re.search(r"elf-fast: .*\.png: expected an image of 8x8 pixels, got 16x16", said)


def test_two_processes_train_and_evaluate_each_sample_once(folder, tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "elf_fast.cli", "train", "--data-dir", str(folder), "--output", str(tmp_path / "run"),
        *FLAGS, "--epochs", "2", "--batch-size", "8",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": str(Path(__file__).parents[2])}  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert results["test"]["samples"] == results["validation"]["samples"] == 24
    assert results["history"][-1]["step"] == 2 * 6
    assert results["history"][-1]["loss"] < results["history"][0]["loss"]
    assert done.stdout.count("epoch 1/2") == 1


def test_a_run_without_validation_and_test_ends(folder, tmp_path, capsys):
    images = tmp_path / "images"
    shutil.copytree(folder / "train", images)
    output = tmp_path / "run"
    said = printed(capsys, "train", "--data-dir", images, *FLAGS, "--epochs", 1, "--output", output)
    assert "Results" not in (output / "README.md").read_text()
    assert json.loads((output / "metrics.json").read_text())["split"]["test"] is None
    assert "accuracy" in said
