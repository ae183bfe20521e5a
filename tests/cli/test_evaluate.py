"""`elf-fast eval`: of runs and of the demo."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from pages import Page, check_alone_and_accessible
from run_cases import FLAGS, QUIET, coloured_images, printed, refused

from elf_fast import cli
from elf_fast.runs import files, plain
from elf_fast.training.processes import Processes
from elf_fast.training.trainer import Trainer, resumed_config

CPU = Processes(torch.device("cpu"))

#: What `eval` measures beyond the metrics that a run writes.
MORE = ("anytime_accuracy", "anytime_ece")


def measured(capsys, *arguments) -> dict:
    """The metrics of `eval --json` that runs and the demo write, too."""
    found = json.loads(printed(capsys, "eval", *arguments, "--json"))
    assert [len(found.pop(name)) for name in MORE] == [len(found["exit_shares"])] * 2
    return found


def test_eval_repeats_the_numbers_of_a_run(run, folder, tmp_path, capsys):
    expected = json.loads((run / "metrics.json").read_text())["test"]
    assert measured(capsys, run) == expected
    assert measured(capsys, run / "model.safetensors") == expected
    moved = tmp_path / "moved"
    folder.rename(moved)
    try:
        assert measured(capsys, run, "--data-dir", moved) == expected
    finally:
        moved.rename(folder)
    last = sorted((run / "checkpoints").iterdir())[-1]
    assert measured(capsys, last)["samples"] == 24
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
        assert json.loads(shown.out).items() >= expected.items()
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
    assert measured(capsys, output, *where) == results["test"]


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
    found = measured(capsys, tmp_path / "a.safetensors")
    assert found["overall"] == pytest.approx(expected)


def test_eval_repeats_the_demos_numbers(demo_output, capsys):
    folder, _ = demo_output
    threads = torch.get_num_threads()
    results = json.loads((folder / "results.json").read_text())
    assert measured(capsys, folder / "model.safetensors") == results["runs"][0]["test"]["elf"]
    assert torch.get_num_threads() == threads
    assert cli.main(["eval", str(folder)]) == 0
    overall = 100 * results["runs"][0]["test"]["elf"]["overall"]
    assert re.search(rf"accuracy overall, % +{overall:.1f}\n", capsys.readouterr().out)


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


# More than one number


@pytest.fixture(scope="module")
def mislabelled(folder, tmp_path_factory):
    """The images, of which some of the test part are in folders of other classes, because the
    network makes no mistake on them."""
    images = shutil.copytree(folder, tmp_path_factory.mktemp("mislabelled") / "images")
    for right, wrong, n in (("class0", "class1", 4), ("class2", "class0", 1)):
        for i in range(n):
            image = images / "test" / right / f"{i}.png"
            image.rename(images / "test" / wrong / f"from-{right}-{i}.png")
    return images


def test_eval_prints_every_metric_and_the_worst_confusions(run, mislabelled, capsys):
    where = ("--data-dir", mislabelled)
    m = json.loads(printed(capsys, "eval", run, "--json", *where))
    said = printed(capsys, "eval", run, *where)
    assert "class1 taken for class0: 4, 33.3% of class1\n" in said
    for label, key in (("balanced accuracy, %", "balanced_accuracy"), ("F1 (macro), %", "f1"),
                       ("calibration error, %", "ece")):  # fmt: skip
        assert re.search(rf"^  {re.escape(label)} +{100 * m[key]:.1f}$", said, re.MULTILINE)
    anytime = " / ".join(f"{100 * a:.1f}" for a in m["anytime_accuracy"])
    assert re.search(rf"^    if all left there, % +{anytime}$", said, re.MULTILINE)


def test_the_report_shows_names_that_are_no_utf8(run, mislabelled, tmp_path, monkeypatch):
    """Folders may be called anything; Python reads other bytes as surrogates."""
    from elf_fast.runs import opening

    opened = opening.evaluation

    def renamed(*given, **options):
        return opened(*given, **options)._replace(class_names=["caf\udce9", "class1", "class2"])

    monkeypatch.setattr(opening, "evaluation", renamed)
    report = tmp_path / "report.html"
    given = ["eval", str(run), "--data-dir", str(mislabelled), "--report", str(report)]
    assert cli.main(given) == 0
    assert "caf\\udce9" in Page(report.read_text()).text


def test_the_report_of_a_run_names_files_and_its_command(run, mislabelled, tmp_path, capsys):
    report = tmp_path / "report.html"
    given = ["eval", str(run), "--data-dir", str(mislabelled), "--report", str(report), "--json",
             "--batch", "5"]  # fmt: skip
    assert cli.main(given) == 0
    said = capsys.readouterr()
    m = json.loads(said.out)
    assert said.err.endswith(f"wrote {report}\n")
    page = Page(report.read_text())
    check_alone_and_accessible(page)
    assert f"accuracy{100 * m['overall']:.1f}%" in page.text
    assert " ".join(["elf-fast", *given]) in page.text
    assert "batches of 5 on cpu" in page.text
    assert len(page.named("img")) == round(m["early_wrong"] * m["samples"]) == 5
    assert "class1, taken for class0" in page.text and "from-class0-3.png" in page.text


def test_runs_are_compared_side_by_side(run, demo_output, folder, tmp_path, capsys):
    said = printed(capsys, "eval", run, "--compare", run / "model.safetensors", run)
    m = json.loads(printed(capsys, "eval", run, "--json"))
    (line,) = [line for line in said.splitlines() if line.startswith("balanced accuracy")]
    assert line.split()[-3:] == [f"{100 * m['balanced_accuracy']:.1f}"] * 3
    both = json.loads(
        printed(capsys, "eval", run, "--compare", run / "model.safetensors", "--json")
    )
    assert list(both) == [str(run), str(run / "model.safetensors")]
    assert "same 3 classes" in refused(capsys, "eval", run, "--compare", demo_output[0])


def test_a_run_on_other_test_images_is_not_compared(run, tmp_path, capsys):
    counts = {"train": (60, 24, 10), "val": (8, 8, 8), "test": (4, 4, 4)}
    other = coloured_images(tmp_path / "images", counts)
    weights, metadata = files.load(run / "model.safetensors")
    fewer = {**metadata, "config": {**metadata["config"], "data_dir": str(other)}, "data": None}
    files.save(tmp_path / "other.safetensors", weights, fewer)
    said = refused(capsys, "eval", run, "--compare", tmp_path / "other.safetensors")
    assert "same test images, 24, got" in said and "12; --data-dir" in said


# A target prior


def test_a_prior_weighs_the_classes(run, mislabelled, tmp_path, capsys):
    where = ("--data-dir", mislabelled, "--json")
    plain = json.loads(printed(capsys, "eval", run, *where))
    assert len(set(plain["per_class"])) == 3
    file = tmp_path / "prior.csv"
    file.write_text("class,weight\nclass0,1\nclass2,6\n\nclass1,3\n")
    for given, prior in (("uniform", (1, 1, 1)), ("training", (60, 24, 10)), (file, (1, 3, 6))):
        m = json.loads(printed(capsys, "eval", run, *where, "--test-prior", given))
        expected = sum(w * a for w, a in zip(prior, plain["per_class"], strict=True)) / sum(prior)
        assert m["overall"] == pytest.approx(expected)


def test_classes_without_images_are_said(run, folder, tmp_path, capsys):
    copy = shutil.copytree(folder, tmp_path / "images")
    for image in (copy / "test" / "class2").iterdir():
        image.unlink()
    assert cli.main(["eval", str(run), "--data-dir", str(copy), "--test-prior", "training"]) == 0
    said = capsys.readouterr().err
    assert (
        "--test-prior: 1 of 3 classes have no images here and are left out; they hold 10.6%" in said
    )


def test_a_prior_of_classes_without_images_leaves_nothing_to_compare(run, folder, tmp_path, capsys):
    copy = shutil.copytree(folder, tmp_path / "images")
    for image in (copy / "test" / "class2").iterdir():
        image.unlink()
    file = tmp_path / "prior.csv"
    file.write_text("class0,0\nclass1,0\nclass2,1\n")
    given = ("eval", run, "--data-dir", copy, "--test-prior", file)
    assert json.loads(printed(capsys, *given, "--json"))["overall"] is None
    for option in (["--compare", run], ["--report", tmp_path / "r.html"]):
        assert cli.main([str(a) for a in (*given, *option)]) == 2
        assert "expected at least one image that counts, got none" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, message",
    [
        ("class0,1\nclass1,1", "expected a weight for each of the 3 classes, got none for class2"),
        ("class0,1\nclass0,1", "line 2: expected every class once, got 'class0' again"),
        ("cat,1", "line 1: expected a class of the run, got 'cat'"),
        ("class0,1,2", "line 1: expected class,weight, got 'class0,1,2'"),
        ("class0,-1", "line 1: expected a finite weight of at least 0, got '-1'"),
        ("class0,nan", "line 1: expected a finite weight of at least 0, got 'nan'"),
        ("class0,inf", "line 1: expected a finite weight of at least 0, got 'inf'"),
        ("class0,x", "line 1: expected a finite weight of at least 0, got 'x'"),
        ("class0,0\nclass1,0\nclass2,0", "expected a weight above 0, got 0 for all classes"),
        ("", "expected a weight for each of the 3 classes"),
        (b"\xff\xfe\xfd", "expected text in UTF-8"),
    ],
)
def test_a_malformed_prior_is_named(run, tmp_path, capsys, content, message):
    file = tmp_path / "prior.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    said = refused(capsys, "eval", run, "--test-prior", file)
    assert said.startswith(f"elf-fast: --test-prior: {file}") and message in said


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batch", "8"], "--batch: expected only with --report, got 8"),
        (["--report", "FOLDER"], "--report: expected a file, got the folder"),
        (["--report", "FOLDER/no/report.html"],
         "--report: expected a file in a folder that exists, got"),
        (["--compare", "FOLDER/none"], "expected a checkpoint file, found none"),
        (["--test-prior", "even"],
         "--test-prior: expected uniform, training or a file of lines class,weight, got 'even'"),
        (["--report", "a\0b"], "--report: expected a path without NUL characters"),
        (["--compare", "a\0b"], "--compare: expected a path without NUL characters"),
    ],
)  # fmt: skip
def test_wrong_calls_are_named(run, tmp_path, capsys, arguments, message):
    given = [argument.replace("FOLDER", str(tmp_path)) for argument in arguments]
    assert message in refused(capsys, "eval", run, *given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", ["0", "-3", "x", "1.5"])
def test_a_batch_is_a_positive_number(given, capsys):
    with pytest.raises(SystemExit):
        cli.main(["eval", "run", "--report", "r.html", "--batch", given])
    assert f"--batch: expected a positive integer, got {given!r}" in capsys.readouterr().err


def test_eval_says_that_the_images_chose_the_thresholds(folder, tmp_path, capsys):
    """Only of a run's own validation part."""
    images = shutil.copytree(folder, tmp_path / "images")
    shutil.rmtree(images / "test")
    output = tmp_path / "run"
    assert cli.main(["train", "--data-dir", str(images), *FLAGS, "--output", str(output)]) == 0
    capsys.readouterr()
    assert cli.main(["eval", str(output)]) == 0
    assert "no test part, so these are images that chose the thresholds" in capsys.readouterr().err
    assert cli.main(["eval", str(output), "--data-dir", str(images)]) == 0
    assert capsys.readouterr().err == ""
