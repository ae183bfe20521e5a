"""A run resumes and is evaluated on the data that it was made of."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from run_cases import DIGITS, QUIET, coloured_images, evaluated, printed, refused

pytest.importorskip("torchvision")

from elf_fast import data
from elf_fast.data.images import ImageArray
from elf_fast.runs import contents, files, opening, plain
from elf_fast.runs.config import TrainConfig
from elf_fast.runs.files import CheckpointError
from elf_fast.training.processes import Processes
from elf_fast.training.trainer import Trainer, train

CPU = Processes(torch.device("cpu"))
pytestmark = pytest.mark.usefixtures("one_thread")


def trained(root: Path, counts: dict[str, tuple[int, ...]], **settings: object) -> TrainConfig:
    """A run of one epoch in root/run on images in root/data; its settings."""
    coloured_images(root / "data", counts)
    config = replace(
        DIGITS, dataset="folder", imbalance=None, transforms="small", img_size=16, batch_size=8,
        data_dir=str(root / "data"), output=str(root / "run"), **settings,
    )  # fmt: skip
    train(config, console=QUIET)
    return config


@pytest.fixture(scope="module")
def tested(tmp_path_factory) -> Path:
    """The folder of data and run; the data have all three parts."""
    root = tmp_path_factory.mktemp("tested")
    trained(root, {"train": (8, 6), "val": (3, 3), "test": (4, 4)})
    return root


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    """The same for data without parts, of which a quarter is held out."""
    root = tmp_path_factory.mktemp("held_out")
    trained(root, {".": (8, 8)}, validation_fraction=0.25)
    return root


@pytest.fixture
def copied(tmp_path) -> Callable[[Path], tuple[Path, TrainConfig]]:
    """Copies data and run into a folder of their own; returns it and the settings there."""

    def copy(root: Path) -> tuple[Path, TrainConfig]:
        shutil.copytree(root, tmp_path, dirs_exist_ok=True)
        _, metadata = opening.read(tmp_path / "run")
        place = {"data_dir": str(tmp_path / "data"), "output": str(tmp_path / "run")}
        return tmp_path, plain.from_dict({**metadata["config"], **place})

    return copy


def rename_a_class(root: Path) -> None:
    for part in ("train", "test", "val", "."):
        if (root / part / "class0").exists():
            (root / part / "class0").rename(root / part / "blossom")


def swap_two_classes(root: Path) -> None:
    """The names, too, but other images under them."""
    for part in ("train", "test", "val"):
        (root / part / "class0").rename(root / part / "x")
        (root / part / "class1").rename(root / part / "class0")
        (root / part / "x").rename(root / part / "class1")


def add(folder: Path, name: str = "zzz.png") -> None:
    shutil.copy(folder / "0.png", folder / name)


def test_data_that_moved_are_the_same(tested, copied, capsys):
    root, config = copied(tested)
    where = {"data_dir": config.data_dir}
    for path in ("run", "run/model.safetensors"):
        weights, metadata = opening.read(root / path)
        _, metrics = evaluated(root / path, weights, metadata, **where)
        assert metrics == json.loads((root / "run" / "metrics.json").read_text())["test"]
    assert capsys.readouterr().err == ""
    running = Trainer(config, CPU, console=QUIET)
    running.resume()
    assert running.progress.epoch == 1


def add_a_class(root: Path) -> None:
    shutil.copytree(root / "train" / "class1", root / "train" / "class2")


CHANGES = {
    "a class renamed": (
        rename_a_class,
        "classes: expected the run's 2 classes, got 2: without class0, with blossom",
    ),
    "a class more": (add_a_class, "classes: expected the run's 2 classes, got 3: with class2"),
    "classes swapped": (
        swap_two_classes,
        "train: expected the run's 14 images, got 14: class0 2 fewer, class1 2 more",
    ),
    "an image more to train on": (
        lambda root: add(root / "train" / "class1"),
        "train: expected the run's 14 images, got 15: class1 1 more",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_classes_and_training_images_are_refused_everywhere(change, tested, copied, capsys):
    root, _ = copied(tested)
    make, message = CHANGES[change]
    make(root / "data")
    said = refused(capsys, "eval", root / "run", "--data-dir", root / "data")
    assert said.startswith(f"elf-fast: {root / 'run'}: expected the data that it was made with; ")
    assert message in said
    said = refused(capsys, "train", "--resume", root / "run", "--data-dir", root / "data")
    assert message in said and "; On other data, start a new run." in said


def test_other_test_images_are_refused_unless_their_place_is_named(tested, copied, capsys):
    root, config = copied(tested)
    test = root / "data" / "test"
    add(test / "class0")
    (test / "class1" / "1.png").rename(test / "class1" / "9.png")
    weights, metadata = opening.read(root / "run")
    metadata["config"]["data_dir"] = config.data_dir
    changes = "class0 1 more, class1 equally many, but other files"
    message = f"test: expected the run's 8 images, got 9: {changes}"
    with pytest.raises(CheckpointError, match=f"made with\n{message}\nTo evaluate .*--data-dir"):
        evaluated(root / "run", weights, metadata)
    assert cli_metrics(root, capsys) == (9, message + "\n")
    shutil.rmtree(test)
    with pytest.raises(CheckpointError, match="test: expected the run's 8 images, got none"):
        evaluated(root / "run", weights, metadata)
    assert cli_metrics(root, capsys) == (6, "test: expected the run's 8 images, got none\n")


def cli_metrics(root: Path, capsys) -> tuple[int, str]:
    """(samples, stderr) of `elf-fast eval --json` on root/data."""
    from elf_fast import cli

    flags = ["--data-dir", str(root / "data"), "--json"]
    assert cli.main(["eval", str(root / "run"), *flags]) == 0
    shown = capsys.readouterr()
    return json.loads(shown.out)["samples"], shown.err


def test_validation_that_may_hold_trained_images_is_refused(held_out, copied, capsys):
    """An image goes and another comes: the counts stay, the choice changes."""
    root, config = copied(held_out)
    assert cli_metrics(root, capsys) == (4, "")
    (root / "data" / "class0" / "1.png").unlink()
    add(root / "data" / "class0")
    said = refused(capsys, "eval", root / "run", "--data-dir", root / "data")
    assert (
        "validation: expected the run's 4 images, got 4: class0 equally many, but other files"
        in said
    )
    assert "may hold some that were trained on" in said
    assert "class0 equally many" in refused(
        capsys, "train", "--resume", root / "run", "--data-dir", root / "data"
    )


@pytest.mark.parametrize("settings", [{"validation_fraction": 0.5}, {"data_seed": 7}])
def test_settings_that_would_move_trained_images_into_validation(settings, held_out, copied):
    _, config = copied(held_out)
    running = Trainer(replace(config, **settings), CPU, console=QUIET)
    with pytest.raises(CheckpointError, match="validation: expected the run's 4 images, got"):
        running.resume()


def test_settings_that_choose_training_images_may_change(tested, copied):
    _, config = copied(tested)
    running = Trainer(replace(config, imbalance=2.0), CPU, console=QUIET)
    running.resume()
    assert running.class_counts == [6, 3]


def test_runs_of_earlier_versions_are_compared_by_names_and_counts(tested, copied, capsys):
    root, config = copied(tested)
    weights, metadata = opening.read(root / "run")
    del metadata["data"]
    files.save(root / "run" / "model.safetensors", weights, metadata)
    add(root / "data" / "test" / "class0")
    assert cli_metrics(root, capsys) == (9, "")
    rename_a_class(root / "data")
    assert "without class0, with blossom" in refused(
        capsys, "eval", root / "run", "--data-dir", root / "data"
    )
    del metadata["class_names"]
    files.save(root / "run" / "model.safetensors", weights, metadata)
    assert cli_metrics(root, capsys) == (9, "")
    for part in ("train", "val", "test"):
        shutil.rmtree(root / "data" / part / "blossom")
    assert "train: expected the run's 2 classes, got 1" in refused(
        capsys, "eval", root / "run", "--data-dir", root / "data"
    )


# Descriptions


def described(*splits: data.Splits) -> list[dict]:
    return [json.loads(json.dumps(contents.describe(s))) for s in splits]


def listed(root: Path, name: str, lines: list[str]) -> data.Splits:
    (root / name).write_text("\n".join(lines))
    return data.from_lists(root, root / name)


def test_lists_in_another_order_make_another_epoch(tmp_path):
    coloured_images(tmp_path, {"a": (3, 2)})
    lines = [f"a/class{c}/{i}.png {c}" for c, n in ((0, 3), (1, 2)) for i in range(n)]
    was, now, fewer = described(
        listed(tmp_path, "1.txt", lines),
        listed(tmp_path, "2.txt", lines[::-1]),
        listed(tmp_path, "3.txt", lines[1:]),
    )
    text = "train: expected the run's 5 images, got 5: the same in another order"
    assert contents.differences(was, now) == {"train": text}
    assert contents.differences(was, fewer)["train"].endswith("got 4: class0 1 fewer")
    assert contents.differences(was, was) == {}


def arrays(images: np.ndarray, names: list[str]) -> data.Splits:
    part = ImageArray(images, torch.tensor([0, 1, 0, 1]), lambda image: torch.zeros(3, 1, 1))
    return data.Splits(train=part, validation=None, test=part, class_names=names)


def test_images_in_memory_are_compared_by_their_bytes():
    images = np.random.RandomState(0).randint(0, 255, (4, 8, 8, 3), np.uint8)
    other = images.copy()
    other[3, 0, 0, 0] ^= 1
    names = ["x", "y"]
    was, same, now, turned = described(
        arrays(images, names), arrays(images.copy(), names), arrays(other, names),
        arrays(images, names[::-1]),
    )  # fmt: skip
    assert contents.differences(was, same) == {}
    assert contents.differences(was, now) == {
        part: f"{part}: expected the run's 4 images, got 4: y equally many, but other files"
        for part in ("train", "test")
    }
    text = "classes: expected the run's order, x, y, got y, x"
    assert contents.differences(was, turned) == {"classes": text}


def test_names_of_classes_are_the_same_in_every_locale():
    """Where Python takes names of files for ASCII, other bytes in them are surrogates."""
    images, names = np.zeros((4, 8, 8, 3), np.uint8), ["été", "x"]
    as_in_c = [os.fsencode(name).decode("ascii", "surrogateescape") for name in names]
    was, now = described(arrays(images, as_in_c), arrays(images, names))
    assert was == now and was["class_names"] == names
    assert contents.differences({**was, "class_names": as_in_c}, now) == {}  # of earlier versions


def test_digits_are_compared_by_their_place(tmp_path):
    was, same, other = described(
        data.long_tailed_digits(20.0), data.long_tailed_digits(20.0),
        data.long_tailed_digits(20.0, seed=3),
    )  # fmt: skip
    assert contents.differences(was, same) == {}
    assert set(contents.differences(was, other)) == {"train", "validation", "test"}


def test_messages_and_descriptions_of_many_classes_stay_short():
    C, N = 8142, 10_000
    part = ImageArray(np.zeros((N, 1, 1, 3), np.uint8), torch.arange(N) % C, torch.zeros_like)
    splits = data.Splits(part, part, None, [f"class {c}" for c in range(C)])
    (was,) = described(splits)
    assert len(json.dumps(was["data"])) < 30 * C
    part.targets = (part.targets * 7 + 1) % C
    text = contents.differences(was, contents.describe(splits))["train"]
    assert len(text) < 200 and text.endswith(" more")


def test_processes_that_read_different_data_are_refused(tmp_path):
    class Two(Processes):
        """One process that takes the answer of another for its peer's."""

        def gather(self, value):
            return [value, ("other", "data: 2 classes")] if isinstance(value, tuple) else [value]

    with pytest.raises(ValueError, match="data_dir: expected all processes to read the same data"):
        Trainer(replace(DIGITS, output=str(tmp_path)), Two(torch.device("cpu")), console=QUIET)


def test_a_run_says_what_data_it_found(held_out, copied, capsys):
    root, config = copied(held_out)
    (root / "data" / "class1" / "notes.txt").write_text("none")
    shown = printed(capsys, "train", "--resume", root / "run", "--data-dir", root / "data")
    assert (
        "data: 2 classes, images: 12 to train on, 4 in the validation part, no test part; left "
        "out: 1 x named .txt (class1/notes.txt)" in shown
    )
