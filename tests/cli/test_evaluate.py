"""`elf-fast eval`: of runs and of the demo."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from run_cases import FLAGS, printed, refused

from elf_fast import cli
from elf_fast.runs import files


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
