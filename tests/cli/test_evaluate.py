"""`elf-fast eval`: of runs and of the demo."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from run_cases import FLAGS, QUIET, printed, refused

from elf_fast import cli
from elf_fast.runs import files, plain
from elf_fast.training.processes import Processes
from elf_fast.training.trainer import Trainer, resumed_config

CPU = Processes(torch.device("cpu"))


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
        assert "test: expected the run's 24 images, got none" in refused(capsys, "eval", run)
        said = printed(capsys, "eval", run, "--data-dir", folder)
        assert "seed 3, validation set" in said
    finally:
        (tmp_path / "test").rename(test)


def test_eval_needs_no_training_images(run, folder, tmp_path, capsys):
    """Neither the folders of their classes, nor the folder around them."""
    expected = json.loads((run / "metrics.json").read_text())["test"]
    images = shutil.copytree(folder, tmp_path / "images")
    for image in (images / "train").glob("*/*.png"):
        image.unlink()
    for _ in range(2):
        assert cli.main(["eval", str(run), "--data-dir", str(images), "--json"]) == 0
        shown = capsys.readouterr()
        assert json.loads(shown.out) == expected
        assert shown.err == (
            f"{images}: no training images, so they were not compared with the run's\n"
        )
        shutil.rmtree(images / "train", ignore_errors=True)
    shutil.copytree(folder / "test", images / "train")  # some are there: they are compared
    said = refused(capsys, "eval", run, "--data-dir", images)
    assert "train: expected the run's 94 images, got 24: class0 52 fewer" in said
    shutil.rmtree(images / "train")
    shutil.rmtree(images / "test")
    said = refused(capsys, "eval", run, "--data-dir", images)
    assert "expected a training part beside val, got none" in said


def test_eval_without_training_images_compares_the_test_images(run, folder, tmp_path, capsys):
    weights, metadata = files.load(run / "model.safetensors")
    shutil.copytree(folder / "test", tmp_path / "images" / "test")
    settings = {**metadata["config"], "data_dir": str(tmp_path / "images")}
    files.save(tmp_path / "a.safetensors", weights, {**metadata, "config": settings})
    assert json.loads(printed(capsys, "eval", tmp_path / "a.safetensors", "--json"))
    (tmp_path / "images" / "test" / "class1" / "3.png").unlink()
    assert cli.main(["eval", str(tmp_path / "a.safetensors")]) == 2
    assert "test: expected the run's 24 images, got 23: class1 1 fewer" in capsys.readouterr().err
    del metadata["class_names"]  # a run of an earlier version: the classes are not known
    files.save(tmp_path / "a.safetensors", weights, {**metadata, "config": settings})
    said = refused(capsys, "eval", tmp_path / "a.safetensors")
    assert "expected a training part beside test, got none" in said


@pytest.mark.parametrize("part", ["", "model.safetensors"])
def test_a_run_that_recorded_paths_as_given_is_found_from_any_folder(
    part, run, folder, tmp_path, monkeypatch, capsys
):
    """As runs of earlier versions did; this one lies in runs/a of where it was started."""
    start, settings = tmp_path / "start", {"data_dir": "images", "output": "./runs/a"}
    shutil.copytree(folder, start / "images")
    shutil.copytree(run, start / "runs" / "a")
    weights, metadata = files.load(run / "model.safetensors")
    recorded = {**metadata, "config": {**metadata["config"], **settings}}
    files.save(start / "runs" / "a" / "model.safetensors", weights, recorded)
    (start / "runs" / "a" / "config.yaml").write_text("data_dir: images\noutput: runs/a\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = Path("../start/runs/a", part)
    assert json.loads(printed(capsys, "eval", path, "--json"))["samples"] == 24
    if not part:
        assert resumed_config(path).data_dir == str(start / "images")
    shutil.move(start / "runs" / "a", tmp_path / "moved")
    said = refused(capsys, "eval", tmp_path / "moved" / part)
    assert "--data-dir: expected a folder with one subfolder per class, got images" in said


def test_a_new_run_records_whole_paths(run, folder):
    _, metadata = files.load(run / "model.safetensors")
    assert metadata["config"]["data_dir"] == str(folder)
    place = os.path.relpath(folder)
    made = Trainer(plain.from_run(metadata["config"], data_dir=place), CPU, console=QUIET)
    assert made.config.data_dir == str(folder)


def test_eval_says_which_checkpoint_it_took(run, capsys):
    last = sorted((run / "checkpoints").iterdir())[-1]
    assert cli.main(["eval", str(run)]) == 0
    assert capsys.readouterr().err == ""
    for path, removed in ((last, False), (run, True)):
        weights = run / "model.safetensors"
        hidden = weights.rename(run / "hidden") if removed else None
        try:
            assert cli.main(["eval", str(path), "--json"]) == 0
        finally:
            if hidden:
                hidden.rename(weights)
        assert capsys.readouterr().err == (
            f"{path}: checkpoint {last.name}, after 4 of 4 epochs, thresholds not calibrated yet\n"
        )


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


def test_eval_names_what_no_longer_fits(run, tmp_path, capsys):
    weights, metadata = files.load(run / "model.safetensors")
    for setting, message in (
        ({"imbalance": 1e6}, "imbalance: expected at most 10"),
        ({"gone": 1}, "gone: expected a setting"),
    ):
        changed = {**metadata, "config": {**metadata["config"], **setting}}
        files.save(tmp_path / "a.safetensors", weights, changed)
        assert cli.main(["eval", str(tmp_path / "a.safetensors")]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1


def test_eval_runs_where_the_device_of_the_run_is_missing(run, tmp_path, capsys):
    weights, metadata = files.load(run / "model.safetensors")
    elsewhere = {**metadata, "config": {**metadata["config"], "device": "cuda:99"}}
    files.save(tmp_path / "a.safetensors", weights, elsewhere)
    expected = json.loads((run / "metrics.json").read_text())["test"]["overall"]
    found = json.loads(printed(capsys, "eval", tmp_path / "a.safetensors", "--json"))
    assert found["overall"] == pytest.approx(expected)


def test_eval_repeats_the_demos_numbers(demo_output, capsys):
    folder, _ = demo_output
    threads = torch.get_num_threads()
    assert cli.main(["eval", str(folder / "model.safetensors"), "--json"]) == 0
    results = json.loads((folder / "results.json").read_text())
    assert json.loads(capsys.readouterr().out) == results["runs"][0]["test"]["elf"]
    assert torch.get_num_threads() == threads
    assert cli.main(["eval", str(folder)]) == 0
    overall = 100 * results["runs"][0]["test"]["elf"]["overall"]
    assert f"accuracy overall, %{'':23}{overall:.1f}" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--data-dir", "--lists"])
def test_eval_refuses_a_place_of_the_demos_data(flag, demo_output, capsys):
    said = refused(capsys, "eval", demo_output[0], flag, "photos")
    assert f"{flag}: expected none with weights of the demo, got photos" in said


def test_eval_refuses_bad_files_in_one_line(demo_output, tmp_path, capsys):
    assert "found none" in refused(capsys, "eval", tmp_path / "missing.safetensors")
    assert "found none" in refused(capsys, "eval", tmp_path)
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes((demo_output[0] / "model.safetensors").read_bytes()[:1000])
    assert "cut short" in refused(capsys, "eval", bad)


def test_eval_refuses_a_checkpoint_of_another_network(demo_output, tmp_path, capsys):
    from elf_fast.runs import files

    state, metadata = files.load(demo_output[0] / "model.safetensors")
    path = tmp_path / "other.safetensors"
    files.save(path, state, {**metadata, "network": "resnet"})
    assert "got network 'resnet'" in refused(capsys, "eval", path)
    files.save(path, {k: v for k, v in state.items() if k != "temperatures"}, metadata)
    assert "weights do not fit" in refused(capsys, "eval", path)
    files.save(path, state, {**metadata, "imbalance": 20.0})
    assert "expected class_counts" in refused(capsys, "eval", path)
