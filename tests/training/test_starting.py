"""A run that starts from weights of the user's, from the first start to `eval`."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from run_cases import DIGITS, QUIET, printed, refused

from elf_fast.runs import files, opening
from elf_fast.runs.networks import backbone_name, network
from elf_fast.training.trainer import Trainer, resumed_config, train

for name in ("rich", "safetensors", "sklearn", "timm", "torchmetrics", "torchvision", "yaml"):
    pytest.importorskip(name)

CLASSES = 10


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """A folder with weights to start from and class weights."""
    folder = tmp_path_factory.mktemp("given")
    model = network(replace(DIGITS, exits=(), seed=5), [9] * CLASSES)
    torch.save(model.state_dict(), folder / "a.pth")
    (folder / "a.csv").write_text("".join(f"{c},{c + 1}\n" for c in range(CLASSES)))
    return folder


@pytest.fixture(scope="module")
def started(given, tmp_path_factory) -> tuple[Path, str]:
    """A finished run, and what it said."""
    output = tmp_path_factory.mktemp("runs") / "run"
    shown = io.StringIO()
    config = replace(
        DIGITS, init_from=str(given / "a.pth"), class_weights=str(given / "a.csv"),
        freeze_backbone="layer2", layer_decay=0.5, mixup=0.2, output=str(output), device="cpu",
    )  # fmt: skip
    train(config, console=Console(file=shown, width=500))
    return output, shown.getvalue()


def test_the_frozen_part_is_that_of_the_file(started, given):
    folder, _ = started
    weights, _ = opening.read(folder)
    source = {backbone_name(k): v for k, v in torch.load(given / "a.pth").items()}
    same = {backbone_name(k) for k, v in weights.items()
            if backbone_name(k) and torch.equal(v, source[backbone_name(k)])}  # fmt: skip
    assert {n for n in source if n and n.startswith(("conv1", "bn1", "layer1", "layer2"))} <= same
    assert not any(name.startswith(("layer3", "fc")) and "num" not in name for name in same)
    assert weights["exit_loss.weight"].tolist() == [float(c + 1) for c in range(CLASSES)]


def test_the_run_says_what_it_starts_from(started, given):
    _, said = started
    assert f"weights from {given / 'a.pth'}: 44 of 44 tensors\n" in said
    assert "56,702 of 75,790 parameters train, the others are frozen" in said
    assert "lr times 0.5, 1" in said


def test_the_files_are_not_needed_to_evaluate(started, given, tmp_path, capsys):
    folder, _ = started
    moved = given.rename(tmp_path / "moved")
    try:
        assert "accuracy overall" in printed(capsys, "eval", folder)
        config = resumed_config(folder, epochs=2, class_weights=str(moved / "a.csv"))
        trainer = Trainer(config, processes(), console=QUIET)
        trainer.resume()
        assert trainer.progress.epoch == 1
        weights, _ = files.load(folder / "model.safetensors")
        name = "stages.0.conv1.weight"
        assert torch.equal(trainer.model.state_dict()[name], weights[name])
    finally:
        moved.rename(given)


def processes():
    from elf_fast.training.processes import Processes

    return Processes(torch.device("cpu"))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--layer-decay", "0.9"], "expected layer_decay 0.5 as in the checkpoint, got 0.9"),
        (["--freeze-backbone", "layer1"], "expected freeze_backbone layer2 as in the checkpoint"),
    ],
)
def test_what_is_frozen_stays_so_when_a_run_resumes(started, flags, message, capsys):
    assert message in refused(capsys, "train", "--resume", started[0], "--epochs", "2", *flags)


FLAGS = "--dataset digits --model cifar_resnet8 --workers 0 --device cpu".split()


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            "--init-from none.pth",
            "--init-from: expected a file or the folder of a run, got none.pth",
        ),
        ("--init-from . --pretrained", "--init-from: expected none with pretrained weights, got ."),
        ("--pretrained", "--pretrained: expected a network with pretrained weights in timm or"),
        ("--freeze-backbone layr1", "--freeze-backbone: expected all or a module of CifarResNet"),
        ("--class-weights none.csv", "--class-weights: expected a text file, got none.csv"),
        ("--layer-decay 2", "--layer-decay: expected a number in [0.0, 1.0], got 2.0"),
        ("--mixup -1", "--mixup: expected a number in [0.0, 1000000.0], got -1.0"),
    ],
)
def test_wrong_calls_are_one_line_and_claim_no_folder(flags, message, capsys, tmp_path):
    output = tmp_path / "run"
    assert message in refused(capsys, "train", *FLAGS, "--output", output, *flags.split())
    assert not output.exists()
