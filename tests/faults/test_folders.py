"""Folders as people have them: parts of other names, other extensions, links, pipes."""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("torchvision")

from torchvision.datasets import ImageFolder

from elf_fast import data
from elf_fast.runs.opening import CHECKPOINTS
from elf_fast.training.folder import CONFIG


def write(root: Path, *names: str) -> Path:
    """Images of 4x4 pixels below root, in their format by extension."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        form = "JPEG" if path.suffix.lower() in (".jfif", ".heic") else None
        Image.new("RGB", (4, 4), (90, 90, 90)).save(path, format=form)
    return root


def in_parts(root: Path, *parts: str) -> Path:
    return write(root, *(f"{part}/{c}/{i}.png" for part in parts for c in "xy" for i in range(2)))


def sizes(splits: data.Splits) -> list[int | None]:
    parts = (splits.train, splits.validation, splits.test)
    return [None if part is None else len(part) for part in parts]


@pytest.mark.parametrize(
    "parts, expected",
    [
        (("train", "valid"), [4, 4, None]),
        (("Training", "Testing"), [4, None, 4]),
        (("TRAIN", "Validation", "TEST"), [4, 4, 4]),
        (("training", "dev", "testing"), [4, 4, 4]),
    ],
)
def test_parts_have_their_usual_names(parts, expected, tmp_path):
    splits = data.image_folder(in_parts(tmp_path, *parts))
    assert splits.class_names == ["x", "y"] and sizes(splits) == expected
    assert splits.left_out == ""


@pytest.mark.parametrize(
    "files, message",
    [
        (("val/x/1.png", "test/x/1.png"), "expected a training part beside test, val, got none"),
        (
            ("Testing/x/1.png",),
            "expected a training part beside Testing, got none; parts are named",
        ),
        (
            ("train/x/1.png", "val/x/1.png", "valid/x/1.png"),
            "one folder for the validation part, got val, valid",
        ),
        (("train/1.png", "bus/1.png", "car/1.png"), "parts by name, train, beside bus, car"),
        (("train/steam/1.png", "bus/1.png"), "parts by name, train, beside bus"),
        (("bus/1.png", "dev/1.png"), "parts by name, dev, beside bus"),
        (("train/1.png",), "train: expected one subfolder per class, got none among 1 entries"),
        (("training_set/x/1.png", "test_set/x/1.png"), "training_set, test_set, which look like"),
        (("train2017/1.jpg", "val2017/1.jpg"), "train2017, val2017, which look like parts"),
        (("set/train/x/1.png", "set/val/x/1.png"), "set, which holds the parts of a data set"),
        (("1.png", "2.png"), "expected one subfolder per class, got none among 2 entries"),
    ],
)
def test_folders_that_may_mean_several_things_are_refused(files, message, tmp_path):
    with pytest.raises(data.DataError) as error:
        data.image_folder(write(tmp_path, *files))
    assert message in str(error.value)


def test_a_class_may_be_called_train_inside_the_training_part(tmp_path):
    splits = data.image_folder(write(tmp_path, "train/train/1.png", "train/bus/1.png"))
    assert splits.class_names == ["bus", "train"]
    splits = data.image_folder(write(tmp_path / "b", "bullet train/1.png", "steam-train/1.png"))
    assert splits.class_names == ["bullet train", "steam-train"]


def nested(folder: Path, levels: int, name: str) -> None:
    """Folders in folders, also where their path is too long for the system."""
    folder.mkdir()
    inside = os.open(folder, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir(name, dir_fd=inside)
        outside, inside = inside, os.open(name, os.O_RDONLY, dir_fd=inside)
        os.close(outside)
    os.close(inside)


def test_folders_beside_parts_are_read_as_those_of_classes_are(tmp_path):
    root = in_parts(tmp_path / "root", "train")
    write(root, "hidden/.thumbs/1.png")
    (root / "linked").mkdir()
    (root / "linked" / "samples").symlink_to(root / "train" / "x")
    (root / "linked" / "gone.png").symlink_to("nowhere")
    nested(root / "deep", 200, "a")
    nested(root / "long", 25, "a" * 200)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 150)  # deeper folders take long to delete
    try:
        splits = data.image_folder(root)
    finally:
        sys.setrecursionlimit(limit)
    assert splits.class_names == ["x", "y"]
    assert splits.left_out == (
        "3 x folder without images (deep), 1 x folder that cannot be read (long)"
    )
    write(tmp_path, "store/1.png")
    (root / "bus").mkdir()
    (root / "bus" / "photos").symlink_to(tmp_path / "store")
    with pytest.raises(data.DataError, match="parts by name, train, beside bus; "):
        data.image_folder(root)


def test_runs_among_the_data_are_no_classes(tmp_path):
    def run(*names: str) -> None:
        for name in names:
            (tmp_path / name / CHECKPOINTS).mkdir(parents=True)
            write(tmp_path, f"{name}/{CHECKPOINTS}/1.png")
            for file in (CONFIG, "metrics.json"):
                (tmp_path / name / file).touch()

    write(tmp_path, "flat/x/1.png", "flat/y/1.png", "parts/train/x/1.png", "parts/test/x/1.png")
    run("flat/run", "flat/test", "flat/runs/a", "flat/runs/b/c", "flat/x/run", "parts/dev")
    splits = data.image_folder(tmp_path / "flat")
    assert splits.class_names == ["x", "y"] and sizes(splits) == [2, None, None]
    assert splits.left_out == "5 x folder of a run (run)"
    splits = data.image_folder(tmp_path / "parts")
    assert sizes(splits) == [1, None, 1] and splits.left_out == "1 x folder of a run (dev)"
    run("flat/y")  # a class all the same
    assert data.image_folder(tmp_path / "flat").class_names == ["x", "y"]


# Extensions


def test_files_of_all_usual_extensions_are_images(tmp_path):
    names = ["x/1.jfif", "x/2.gif", "y/3.GIF", "y/4.JPG", "y/5.Png", "y/6.pbm", "y/7.webp"]
    splits = data.image_folder(write(tmp_path, *names))
    assert [os.path.basename(path) for path in splits.train.paths] == [n[2:] for n in names]
    assert all(image.shape == (3, 224, 224) for image, _ in splits.train)


def test_a_class_whose_files_are_no_images_is_named_with_what_it_holds(tmp_path):
    write(tmp_path, "x/1.png", "y/1.heic", "y/2.heic", "y/deep/3.HEIC")
    (tmp_path / "y" / "list").write_text("1, 2")
    (tmp_path / "z").mkdir()
    with pytest.raises(data.DataError) as error:
        data.image_folder(tmp_path)
    lines = str(error.value).splitlines()
    assert lines[:2] == [
        f"{tmp_path}/y: expected images, got 3 x named .heic (y/1.heic), "
        "1 x named without an extension (y/list)",
        f"{tmp_path}/z: expected images, got none",
    ]
    assert lines[2].startswith("the extensions of images are .jpg .jpeg")


def test_a_class_does_not_vanish_from_a_test_part(tmp_path):
    write(tmp_path, "train/x/1.png", "train/y/1.png", "test/x/1.png", "test/y/1.heic")
    with pytest.raises(data.DataError, match="test/y: expected images, got 1 x named .heic"):
        data.image_folder(tmp_path)
    (tmp_path / "test" / "y" / "1.heic").unlink()  # an empty folder is a class without test images
    assert data.image_folder(tmp_path).test.targets.tolist() == [0]


def test_names_in_two_forms_of_unicode_are_explained(tmp_path):
    """macOS writes accents as characters of their own."""
    write(tmp_path, "train/\u00e9/1.png", "train/x/1.png", "val/e\u0301/1.png", "val/x/1.png")
    said = "got 1 more: (.*); rename \\1: training has it in other characters"
    with pytest.raises(data.DataError, match=said):
        data.image_folder(tmp_path)


def test_what_is_left_out_is_said(tmp_path):
    write(tmp_path, "train/x/1.png", "train/y/1.png", "train/x/._1.png", "train/stray.png",
          "train/.ipynb_checkpoints/1.png", "__MACOSX/train/1.png",
          "train/x/@eaDir/1.png/SYNOPHOTO_THUMB_M.png")  # fmt: skip
    (tmp_path / "docs").mkdir()
    for name in ("train/x/notes.txt", "train/y/notes.txt", "LICENSE"):
        (tmp_path / name).write_text("text")
    splits = data.image_folder(tmp_path)
    assert splits.class_names == ["x", "y"] and sizes(splits) == [2, None, None]
    assert splits.left_out == (
        "4 x hidden (__MACOSX), 2 x named .txt (train/x/notes.txt), 1 x folder without images "
        "(docs), 1 x named without an extension (LICENSE), 1 x outside of the class folders "
        "(train/stray.png)"
    )
    assert splits.summary() == (
        "data: 2 classes, images: 2 to train on, no validation part, no test part; left out: "
        + splits.left_out
    )


def test_names_that_are_not_utf8_can_be_printed(tmp_path):
    write(tmp_path, "x/1.png")
    (tmp_path / "x" / os.fsdecode(b"\xff.txt")).write_text("")
    data.image_folder(tmp_path).summary().encode()


# Links, pipes


def test_links_add_no_image_twice(tmp_path):
    root = in_parts(tmp_path / "around" / "root", "train")
    write(tmp_path, "around/other/1.png", "s/album/1.png", "s/album/deep/2.png", "s/3.png")
    for name, to in {
        "to itself": "to itself",
        "to its parent": "..",
        "to the root": "../..",
        "around the root": "../../..",
        "to another class": "../y",
        "once": tmp_path / "s" / "album",
        "twice": tmp_path / "s" / "album" / "deep",
    }.items():
        (root / "train" / "x" / name).symlink_to(to)
    (tmp_path / "s" / "album" / "up").symlink_to("..")
    (root / "train" / "x" / "gone.png").symlink_to("nowhere.png")
    (root / "train" / "x" / "one.png").symlink_to(tmp_path / "s" / "album" / "1.png")
    splits = data.image_folder(root)
    x = [path.removeprefix(f"{root}/train/x/") for path in splits.train.paths[:-2]]
    assert x == ["0.png", "1.png", "one.png", "once/1.png", "twice/2.png"]
    assert splits.class_counts == [5, 2]
    assert "6 x link to a folder that is read elsewhere" in splits.left_out
    assert "2 x broken link" in splits.left_out


@pytest.mark.parametrize(
    "link, to, message",
    [
        ("train/z", "x", "train/z: expected a folder of its own, got the same as .*train/x"),
        ("val", "train", "val/x: expected a folder of its own, got the same as .*train/x"),
        ("train/all", "..", "train/all: expected a folder of one class, got one around classes"),
    ],
)
def test_links_that_make_one_folder_two_classes_are_refused(link, to, message, tmp_path):
    in_parts(tmp_path, "train")
    (tmp_path / link).symlink_to(to)
    with pytest.raises(data.DataError, match=message):
        data.image_folder(tmp_path)


def test_a_data_set_of_links_is_read(tmp_path):
    """Some classes of a larger data set, by links to their folders."""
    store = in_parts(tmp_path / "store", "train", "val")
    for part in ("train", "val"):
        (tmp_path / "few" / part).mkdir(parents=True)
        (tmp_path / "few" / part / "cat").symlink_to(store / part / "x")
    assert sizes(data.image_folder(tmp_path / "few")) == [2, 2, None]


def test_pipes_are_not_opened(tmp_path):
    write(tmp_path, "x/1.png")
    os.mkfifo(tmp_path / "x" / "2.png")
    os.mkfifo(tmp_path / "pipe")
    splits = data.image_folder(tmp_path)
    assert len(splits.train) == 1 and "2 x pipe, socket or device (pipe)" in splits.left_out
    (tmp_path / "list.txt").write_text("x/1.png 0\nx/2.png 0\n")
    with pytest.raises(data.DataError, match="1 of 2 images are missing: .*x/2.png"):
        data.from_lists(tmp_path, tmp_path / "list.txt")


def test_the_order_of_images_is_that_of_torchvision(tmp_path):
    """Runs of earlier versions hold out their validation images by this order."""
    names = ["10.png", "9.jpg", "a/1.png", "a-b/1.png", "a b/1.png", "a/b/1.png", "Z.png", "ä.png"]
    write(tmp_path, *(f"{c}/{name}" for c in ("x", "X", "y-", "y") for name in names))
    torchvisions = ImageFolder(tmp_path)
    splits = data.image_folder(tmp_path)
    assert splits.class_names == torchvisions.classes
    assert splits.train.paths == [path for path, _ in torchvisions.samples]
    assert torch.equal(splits.train.targets, torch.tensor(torchvisions.targets))


def test_a_class_without_images_in_validation_may_hold_hidden_files(tmp_path):
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / part / name / "0.png")
    (tmp_path / "val" / "b" / "0.png").unlink()
    (tmp_path / "val" / "b" / ".gitkeep").touch()
    assert data.image_folder(tmp_path).validation.targets.tolist() == [0]
