"""Settings, their way from flags and YAML, and what the trainer does with them."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
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

from PIL import Image
from rich.console import Console

from elf_fast import cli
from elf_fast.training import build, checkpoint, config
from elf_fast.training.config import TrainConfig
from elf_fast.training.distributed import Ranks
from elf_fast.training.ema import Average
from elf_fast.training.trainer import Trainer, train

DIGITS = TrainConfig(
    dataset="digits",
    imbalance=50.0,
    model="cifar_resnet8",
    epochs=1,
    batch_size=64,
    lr=0.05,
    warmup_epochs=0,
    workers=0,
    log_tensorboard=False,
)
QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trainer(**changes) -> Trainer:
    return Trainer(replace(DIGITS, **changes), Ranks(torch.device("cpu")), console=QUIET)


# Settings


def parse(*flags: str) -> TrainConfig:
    """The settings that a command line gives, without a YAML file."""
    import argparse

    parser = argparse.ArgumentParser()
    config.add_flags(parser)
    return config.from_dict(config.from_arguments(parser.parse_args(flags)))


def test_flags_become_settings_of_the_right_type():
    given = parse(*"--data-dir x --epochs 3 --lr 1e-3 --amp --keep-exited --thresholds 0.5 inf "
                  "--exits layer1 layer2 --model-kwargs drop_rate=0.1 name=a".split())  # fmt: skip
    assert given == TrainConfig(
        data_dir="x", epochs=3, lr=1e-3, amp=True, drop_exited=False, thresholds=(0.5, math.inf),
        exits=("layer1", "layer2"), model_kwargs={"drop_rate": 0.1, "name": "a"},
    )  # fmt: skip
    assert parse(
        *"--data-dir x --drop-exited --no-calibrate --torchcompile".split()
    ) == TrainConfig(data_dir="x", drop_exited=True, calibrate=False, torchcompile="inductor")
    assert parse(*"--data-dir x --no-exits".split()).exits == ()
    assert parse("--data-dir", "x") == TrainConfig(data_dir="x")


def test_every_setting_has_a_flag_and_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    for option in fields(TrainConfig):
        assert "--" + option.name.replace("_", "-") in text
        assert option.metadata["help"].split()[0] in text
    for flag in ("--keep-exited", "--no-exits", "--resume", "--config"):
        assert flag in text


@pytest.mark.parametrize(
    "changes",
    [{}, {"exits": ("layer1",), "thresholds": (0.5, math.inf), "lr": 1e-5}, {"exits": ()}],
)
def test_settings_survive_yaml(changes, tmp_path):
    settings = replace(DIGITS, **changes)
    (tmp_path / "a.yaml").write_text(config.to_yaml(settings))
    assert config.from_dict(config.load_yaml(tmp_path / "a.yaml")) == settings
    strict = json.dumps(config.to_dict(settings), allow_nan=False)
    assert config.from_dict(json.loads(strict)) == settings


def test_yaml_takes_numbers_as_people_write_them(tmp_path):
    (tmp_path / "a.yaml").write_text("dataset: digits\nlr: 1e-3\nexits: layer1\nmin_lr: 0\n")
    assert config.from_dict(config.load_yaml(tmp_path / "a.yaml")) == TrainConfig(
        dataset="digits", lr=1e-3, exits=("layer1",), min_lr=0.0
    )


@pytest.mark.parametrize(
    "values, error, message",
    [
        ({"epoch": 3}, ValueError, "epoch: expected a setting .*; near names: epochs"),
        ({"epochs": 2.5}, TypeError, "epochs: expected an integer, got 2.5"),
        ({"epochs": "many"}, TypeError, "epochs: expected an integer, got 'many'"),
        ({"epochs": True}, TypeError, "epochs: expected an integer, got True"),
        ({"lr": "fast"}, TypeError, "lr: expected a number, got 'fast'"),
        ({"lr": None}, TypeError, "lr: expected a number, got None"),
        ({"lr": -1.0}, ValueError, "lr: expected a finite number >= 0.0, got -1.0"),
        ({"amp": "yes"}, TypeError, "amp: expected true or false, got 'yes'"),
        ({"model": 3}, TypeError, "model: expected a text, got 3"),
        ({"loss": "ce"}, ValueError, "loss: expected one of cross_entropy, .*, got 'ce'"),
        ({"thresholds": [0.5, "x"]}, TypeError, "thresholds: expected a number, got 'x'"),
        ({"decay_milestones": [True]}, TypeError, "decay_milestones: expected an integer, got Tr"),
        ({"model_kwargs": ["a"]}, ValueError, "model_kwargs: expected KEY=VALUE, got 'a'"),
        ({"batch_size": 0}, ValueError, "batch_size: expected an integer >= 1, got 0"),
        ({"momentum": 2}, ValueError, r"momentum: expected a number in \[0.0, 1.0\], got 2.0"),
        ({"model_kwargs": None}, ValueError, "model_kwargs: expected KEY=VALUE, got None"),
        ({"model_kwargs": ["a=[1"]}, ValueError, r"KEY=VALUE with a YAML value, got 'a=\[1'"),
        ({"dataset": "folder"}, ValueError, "data_dir: expected a folder of images .*, got none"),
        ({"max_flops": 0.5, "calibrate": False}, ValueError, "max_flops: expected none without"),
        ({"drw_epoch": 9, "epochs": 9}, ValueError,
         "drw_epoch: expected an epoch below epochs = 9, got 9"),
        ({"dataset": "Places-LT", "data_dir": "x", "imbalance": 9}, ValueError,
         "imbalance: expected none for Places-LT"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(values, error, message):
    with pytest.raises(error, match=message):
        config.from_dict({"dataset": "digits", **values})


def test_the_documented_commands_name_settings_that_exist():
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text().replace("\\\n", "")
    commands = re.findall(r"^(?:.* )?(?:elf-fast|elf_fast.cli) train (.*)$", text, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        flags = command.partition("#")[0].split()
        assert flags[0] == "--resume" or parse(*flags).data_dir


# Parts


def test_the_learning_rate_follows_its_schedule():
    cosine = replace(DIGITS, epochs=10, warmup_epochs=2, lr=0.5, min_lr=0.1)
    rates = [build.learning_rate(cosine, step, 5) for step in range(50)]
    assert rates[:10] == pytest.approx([0.5 * (k + 1) / 10 for k in range(10)])
    expected = [0.1 + 0.4 * (1 + math.cos(math.pi * (k - 10) / 40)) / 2 for k in range(10, 50)]
    assert rates[10:] == pytest.approx(expected)
    steps = replace(cosine, sched="step", decay_milestones=(4, 6), decay_rate=0.1)
    rates = [build.learning_rate(steps, step, 5) for step in (9, 10, 19, 20, 29, 30, 49)]
    assert rates == pytest.approx([0.5, 0.5, 0.5, 0.05, 0.05, 0.005, 0.005])


def test_the_average_is_that_of_the_weights_and_leaves_thresholds_alone():
    model = build.network(replace(DIGITS, thresholds=(0.9, math.inf)), [10] * 10)
    average = Average(model, 0.75)
    name = "heads.0.classifier.weight"
    expected = model.get_parameter(name).detach().double().clone()
    statistics = torch.zeros(16, dtype=torch.float64)
    for _ in range(3):
        with torch.no_grad():
            model.get_parameter(name).normal_()
            model.stages[0].bn1.running_mean.normal_()
        model.thresholds[0] -= 0.1
        average.update(model)
        expected = 0.75 * expected + 0.25 * model.get_parameter(name).detach().double()
        statistics = 0.75 * statistics + 0.25 * model.stages[0].bn1.running_mean.double()
    torch.testing.assert_close(average.model.get_parameter(name).double(), expected)
    torch.testing.assert_close(average.model.stages[0].bn1.running_mean.double(), statistics)
    assert torch.equal(average.model.thresholds, model.thresholds)


@pytest.mark.parametrize("loss", ["cross_entropy", "ldam"])
def test_without_exits_the_backbone_starts_with_the_same_weights(loss):
    settings = replace(DIGITS, loss=loss)
    plain = build.network(replace(settings, exits=()), [10] * 10)
    elf = build.network(settings, [10] * 10)
    assert len(plain.stages) == 1 and len(elf.stages) == 3
    theirs = elf.state_dict()
    ours = {k.split(".", 2)[2]: v for k, v in plain.state_dict().items() if k.startswith("stages.")}
    for stage in range(3):
        for key, value in theirs.items():
            if key.startswith(f"stages.{stage}."):
                assert torch.equal(ours.pop(key.split(".", 2)[2]), value), key
    assert not ours


def test_without_exits_all_batches_are_the_same():
    def batches(**changes):
        loader = trainer(**changes).loader
        loader.set_epoch(1)
        return list(loader)

    for (x, y), (x_plain, y_plain) in zip(batches(), batches(exits=()), strict=True):
        assert torch.equal(x, x_plain) and torch.equal(y, y_plain)


def test_ldam_reads_cosines_at_its_own_scale():
    model = build.network(replace(DIGITS, loss="ldam", ldam_scale=20.0), [10] * 10)
    assert model.temperatures.tolist() == pytest.approx([0.05] * 2)
    out = model.eval()(torch.randn(8, 3, 16, 16))
    assert out.logits.abs().max() <= 1 + 1e-6


def test_under_ldam_the_test_in_training_has_the_margins():
    ldam = replace(DIGITS, loss="ldam", drw_epoch=0, thresholds=(0.7,))
    for changes, thresholds in (
        ({}, 0.7),
        ({"train_threshold": (0.8,)}, 0.8),
        ({"train_threshold": (0.8, 0.6)}, [0.8, 0.6]),
    ):
        model = build.network(replace(ldam, **changes), list(range(10, 20)))
        wanted = model.exit_loss.margin_thresholds(thresholds).expand(2, 10)
        assert torch.equal(model.train_thresholds, wanted)
        assert model.thresholds.tolist() == pytest.approx([0.7, 0.7])
    model = build.network(replace(ldam, criterion="margin"), [10] * 10)
    assert model.train_thresholds.tolist() == pytest.approx([0.7, 0.7])


@pytest.mark.parametrize("name", ["cross_entropy", "balanced_softmax"])
def test_deferred_weights_come_at_their_epoch(name, tmp_path, monkeypatch):
    running = trainer(loss=name, drw_epoch=1, output=str(tmp_path), epochs=2)
    used: dict[int, bool] = {}
    step = running._step

    def observed(batches):
        weight = running.model.exit_loss.weight
        used.setdefault(running.position.epoch, not torch.equal(weight, torch.ones(10)))
        return step(batches)

    monkeypatch.setattr(running, "_step", observed)
    running.run()
    assert used == {0: False, 1: True}


# Steps

NHWC = torch.channels_last


def batch(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, 3, 16, 16, generator=generator),
        torch.randint(0, 10, (n,), generator=generator),
    )


#: A network without batch statistics, whose gradient is a mean over samples.
NO_STATISTICS = {
    "model": "timm/test_nfnet",
    "opt": "momentum",
    "momentum": 0.0,
    "weight_decay": 0.0,
}


def test_accumulated_batches_count_by_their_samples():
    x, y = batch(24)
    whole, parts = (trainer(**NO_STATISTICS) for _ in range(2))
    whole._step([(x, y)])
    parts._step([(x[:16], y[:16]), (x[16:], y[16:])])
    assert parts.position.totals.loss == pytest.approx(whole.position.totals.loss, rel=1e-5)
    untouched = trainer(**NO_STATISTICS).model.state_dict()
    moved = 0
    for name, weight in whole.model.named_parameters():
        torch.testing.assert_close(weight, parts.model.get_parameter(name), rtol=1e-4, atol=1e-6)
        moved += not torch.equal(weight, untouched[name])
    assert moved > 10
    assert parts.position.step == 1 and sum(parts.position.totals.exits) == 24


def test_a_clipped_step_has_the_length_it_may_have():
    running = trainer(**NO_STATISTICS, clip_grad=1e-3, lr=2.0)
    before = {k: v.detach().clone() for k, v in running.model.named_parameters()}
    running._step([batch(8)])
    moved = [running.model.get_parameter(k).detach() - v for k, v in before.items()]
    length = torch.cat([m.double().flatten() for m in moved]).norm()
    assert float(length) == pytest.approx(2e-3, rel=1e-3)


def test_mixed_precision_memory_format_and_compilation_reach_the_network():
    running = trainer(amp=True, channels_last=True, torchcompile="eager")
    seen = []
    running.model.stages[0].layer1.register_forward_hook(
        lambda module, inputs, out: seen.append((out.dtype, out.is_contiguous(memory_format=NHWC)))
    )
    (images, targets) = next(iter(running.loader))
    assert images.is_contiguous(memory_format=NHWC)
    running._step([(images, targets)])
    assert seen and set(seen) == {(torch.bfloat16, True)}
    assert all(stage._compiled_call_impl is not None for stage in running.model.stages)
    assert running.model.heads[0].classifier.weight.dtype == torch.float32


# From end to end


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of three classes in train, val and test, told apart by their colour."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for part, counts in (("train", (60, 24, 10)), ("val", (8, 8, 8)), ("test", (8, 8, 8))):
        for c, n in enumerate(counts):
            (root / part / f"class{c}").mkdir(parents=True)
            for i in range(n):
                image = torch.randint(0, 120, (16, 16, 3), generator=generator, dtype=torch.uint8)
                image[..., c] += 100
                Image.fromarray(image.numpy()).save(root / part / f"class{c}" / f"{i}.png")
    return root


FLAGS = (
    "--model cifar_resnet8 --transforms small --img-size 16 --epochs 4 --batch-size 16 --lr 0.05 "
    "--warmup-epochs 0 --workers 0 --no-log-tensorboard --loss balanced_softmax "
    "--train-threshold 0.8 --device cpu"
).split()


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A finished run on `folder`, with a setting from a file."""
    output = tmp_path_factory.mktemp("runs") / "run"
    settings = output.parent / "settings.yaml"
    settings.write_text("epochs: 99\nseed: 3\n")
    torch.set_num_threads(1)
    assert cli.main(["train", "-c", str(settings), "--data-dir", str(folder), "--output",
                     str(output), *FLAGS]) == 0  # fmt: skip
    return output


def test_a_run_learns_and_leaves_its_files(run):
    assert {p.name for p in run.iterdir()} == {
        "config.yaml", "metrics.json", "model.safetensors", "checkpoints"
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
    saved = config.from_dict(config.load_yaml(run / "config.yaml"))
    assert (saved.epochs, saved.seed, saved.momentum) == (4, 3, 0.9)
    assert json.loads((run / "metrics.json").read_text())["settings"] == config.to_dict(saved)


def test_the_weights_hold_thresholds_classes_and_settings(run):
    state, metadata = checkpoint.load(run / "model.safetensors")
    results = json.loads((run / "metrics.json").read_text())
    threshold = results["calibration"]["threshold"]
    assert state["thresholds"].tolist() == pytest.approx([threshold or math.inf] * 2)
    assert state["train_thresholds"].tolist() == pytest.approx([0.8] * 2)
    assert metadata["class_counts"] == [60, 24, 10]
    assert metadata["class_names"] == ["class0", "class1", "class2"]


def printed(capsys, *arguments: object) -> str:
    assert cli.main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def test_eval_repeats_the_numbers_of_a_run(run, folder, tmp_path, capsys):
    expected = json.loads((run / "metrics.json").read_text())["test"]
    assert json.loads(printed(capsys, "eval", run, "--json")) == expected
    assert json.loads(printed(capsys, "eval", run / "model.safetensors", "--json")) == expected
    moved = tmp_path / "moved"
    folder.rename(moved)
    try:
        assert json.loads(printed(capsys, "eval", run, "--data-dir", moved, "--json")) == expected
    finally:
        moved.rename(folder)
    last = sorted((run / "checkpoints").iterdir())[-1]
    assert json.loads(printed(capsys, "eval", last, "--json"))["samples"] == 24
    said = printed(capsys, "eval", run)
    assert "seed 3, test set" in said and "accuracy overall, %" in said
    test = folder / "test"
    test.rename(tmp_path / "test")
    try:
        assert "seed 3, validation set" in printed(capsys, "eval", run)
    finally:
        (tmp_path / "test").rename(test)


def test_a_run_on_lists_is_evaluated_wherever_images_and_lists_are(folder, tmp_path, capsys):
    images = shutil.copytree(folder, tmp_path / "images")
    lists, output = tmp_path / "lists", tmp_path / "run"
    lists.mkdir()
    for part in ("train", "val", "test"):
        found = sorted((images / part).glob("*/*.png"))
        lines = (f"{path.relative_to(images)} {path.parent.name[-1]}\n" for path in found)
        (lists / f"{part}.txt").write_text("".join(lines))
    printed(capsys, "train", "--dataset", "lists", "--data-dir", images, "--lists", lists,
            "--output", output, *FLAGS, "--epochs", 2)  # fmt: skip
    results = json.loads((output / "metrics.json").read_text())
    assert results["class_counts"] == [60, 24, 10]
    assert results["split"] == {"train": 94, "validation": 24, "test": 24}
    lists.rename(tmp_path / "elsewhere")
    assert cli.main(["eval", str(output)]) == 2
    assert (
        f"{lists / 'train.txt'}: expected a list of images, got no file" in capsys.readouterr().err
    )
    images.rename(tmp_path / "moved")
    where = ("--lists", tmp_path / "elsewhere", "--data-dir", tmp_path / "moved")
    assert json.loads(printed(capsys, "eval", output, "--json", *where)) == results["test"]


def test_a_finished_run_resumes_to_the_same_results(run, capsys):
    before = json.loads((run / "metrics.json").read_text())
    assert f"goes on from {run}" in printed(capsys, "train", "--resume", run).replace("\n", "")
    assert json.loads((run / "metrics.json").read_text()) == before


def test_a_finished_run_is_calibrated_anew_for_fewer_flops(folder, tmp_path, capsys):
    def calibrated(*arguments: object) -> dict:
        printed(capsys, "train", *arguments)
        return json.loads((tmp_path / "run" / "metrics.json").read_text())

    data = ["--data-dir", folder, "--output", tmp_path / "run"]
    free = calibrated(*data, *FLAGS, "--exit-weights", 0, 0, 1, "--train-threshold", "inf")
    assert free["validation"]["flops_share"] > 0.9  # only the last exit has learnt
    limited = calibrated("--resume", tmp_path / "run", "--max-flops", 0.6)
    assert limited["validation"]["flops_share"] <= 0.6
    assert limited["validation"]["overall"] < free["validation"]["overall"]
    assert limited["history"] == free["history"]


def test_resuming_a_run_that_is_not_there_yet_starts_it(tmp_path, capsys):
    flags = "--dataset digits --epochs 1 --model cifar_resnet8 --workers 0 --no-log-tensorboard"
    command = ["train", "--resume", tmp_path / "new", *flags.split()]
    assert "goes on" not in printed(capsys, *command)
    assert "goes on from" in printed(capsys, *command)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--resume", "nowhere"], "--resume: expected the folder of a run, got nowhere"),
        (["--data-dir", "nowhere"], "expected a folder with one subfolder per class"),
        (["--dataset", "digits", "--model", "cifar_resnet9"], "depth: expected 6n + 2"),
        (["--dataset", "digits", "--img-size", "8"], "img_size: expected None for digits, got 8"),
        (["--epochs", "x", "--dataset", "digits"], "epochs: expected an integer, got 'x'"),
        (["-c", "nowhere.yaml"], "nowhere.yaml: No such file"),
        (
            ["--dataset", "iNaturalist-2018", "--data-dir", "x"],
            "x/iNaturalist18_train.txt: expected a list of images, got no file; x/iNat",
        ),
        (["--dataset", "digits", "--device", "gpu"], "device: expected cpu, cuda or another"),
        (["--dataset", "digits", "--device", "cuda:99"], "GPUs that torch can use, got 'cuda:99'"),
        (["--dataset", "digits", "--torchcompile", "c"], "torchcompile: expected a backend of"),
        (["--dataset", "digits", "--opt", "sgdd"], "opt: expected an optimiser that timm can make"),
        (
            ["--dataset", "digits", "--model", "cifar_resnet8", "--model-kwargs", "a=1"],
            "model_kwargs: expected options of cifar_resnet8, got {'a': 1}",
        ),
        (["--resume", "a", "--output", "b"], "--output: expected a or none beside --resume a"),
    ],
)
def test_what_the_user_can_put_right_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"data_dir: \xff\n")
    with pytest.raises(ValueError, match="a.yaml: expected YAML: unacceptable character"):
        config.load_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    "name, flag, cure",
    [
        ("wandb", ["--log-wandb", "--no-log-tensorboard"], "wandb"),
        ("tensorboard", [], '"elf_fast[train]"'),
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
    assert "max_flops: expected a validation part" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_last_batch_of_one_image_is_refused_where_it_cannot_be_normalised():
    N = sum(trainer().class_counts)
    with pytest.raises(
        ValueError, match=f"batch_size: .* more than one of {N} images .* got {N - 1}$"
    ):
        trainer(model="torchvision/resnet18", batch_size=N - 1)
    with pytest.raises(ValueError, match="batch_size: .* got 1$"):
        trainer(model="torchvision/resnet18", batch_size=1)
    trainer(model="torchvision/resnet18", batch_size=N - 2)
    trainer(model="cifar_resnet8", batch_size=N - 1, torchcompile="eager")


def test_synchronised_norms_are_refused_without_gpus():
    config = replace(DIGITS, sync_bn=True)
    with pytest.raises(ValueError, match="sync_bn: expected GPUs, as torch does, got cpu"):
        Trainer(config, Ranks(torch.device("cpu"), rank=0, world_size=2), console=QUIET)


def test_eval_names_what_no_longer_fits(run, tmp_path, capsys):
    weights, metadata = checkpoint.load(run / "model.safetensors")
    for setting, message in (
        ({"imbalance": 1e6}, "imbalance: expected at most 10"),
        ({"gone": 1}, "gone: expected a setting"),
    ):
        changed = {**metadata, "config": {**metadata["config"], **setting}}
        checkpoint.save(tmp_path / "a.safetensors", weights, changed)
        assert cli.main(["eval", str(tmp_path / "a.safetensors")]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1


def test_eval_runs_where_the_device_of_the_run_is_missing(run, tmp_path, capsys):
    weights, metadata = checkpoint.load(run / "model.safetensors")
    elsewhere = {**metadata, "config": {**metadata["config"], "device": "cuda:99"}}
    checkpoint.save(tmp_path / "a.safetensors", weights, elsewhere)
    expected = json.loads((run / "metrics.json").read_text())["test"]["overall"]
    found = json.loads(printed(capsys, "eval", tmp_path / "a.safetensors", "--json"))
    assert found["overall"] == pytest.approx(expected)


def test_small_transforms_name_images_of_another_size(folder, tmp_path, capsys):
    flags = ["--data-dir", str(folder), "--output", str(tmp_path / "run"), *FLAGS]
    assert cli.main(["train", *flags, "--img-size", "8"]) == 2
    said = capsys.readouterr().err
    assert re.search(r"elf-fast: .*\.png: expected an image of 8x8 pixels, got 16x16", said)
    cifar = TrainConfig(dataset="cifar10", data_dir="nowhere", img_size=64)
    with pytest.raises(ValueError, match="img_size: expected 32 for cifar10 .* got 64"):
        build.load_splits(cifar)


def test_without_validation_thresholds_stay_and_without_test_validation_is_the_result(tmp_path):
    running = trainer(output=str(tmp_path / "a"), thresholds=(0.4,))
    running.validation = None
    results = running.run()
    assert "calibration" not in results and "validation" not in results
    assert running.model.thresholds.tolist() == pytest.approx([0.4] * 2)
    kept = train(replace(DIGITS, output=str(tmp_path / "b"), calibrate=False, thresholds=(0.4,)),
                 console=QUIET)  # fmt: skip
    assert "calibration" not in kept and kept["validation"]["samples"] == 200


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


# Several processes


def test_two_processes_train_and_evaluate_each_sample_once(folder, tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "elf_fast.cli", "train", "--data-dir", str(folder), "--output", str(tmp_path / "run"),
        *FLAGS, "--epochs", "2", "--batch-size", "8",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": str(Path(__file__).parents[1])}  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert results["test"]["samples"] == results["validation"]["samples"] == 24
    assert results["history"][-1]["step"] == 2 * 6
    assert results["history"][-1]["loss"] < results["history"][0]["loss"]
    assert done.stdout.count("epoch 1/2") == 1
