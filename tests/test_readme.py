"""The examples of README.md and docs/predict.md run as they stand. Its links: test_docs.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from run_cases import FLAGS, coloured_images, parsed

import elf_fast
from elf_fast import cli
from elf_fast.backbones import create
from elf_fast.data import Preprocessing

pytest.importorskip("torchvision")
ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_is_an_example():
    assert BLOCKS


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder that holds a run in runs/photos and an image cat.jpg."""
    folder = tmp_path_factory.mktemp("readme")
    images = coloured_images(folder / "photos", {"train": (8, 6, 4), "val": (2, 2, 2)})
    output = folder / "runs" / "photos"
    flags = [*FLAGS, "--epochs", "1", "--data-dir", str(images), "--output", str(output)]
    assert cli.main(["train", *flags]) == 0
    Image.open(images / "val" / "class1" / "0.png").save(folder / "cat.jpg")
    return folder


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_example_runs(number, photos, one_thread, monkeypatch, capsys):
    monkeypatch.chdir(photos)
    exec(compile(BLOCKS[number], f"README.md block {number}", "exec"), {})
    assert capsys.readouterr().out


def test_the_commands_name_settings_that_exist():
    commands = re.findall(r"^elf-fast train (.+)$", README.replace("\\\n", ""), re.MULTILINE)
    assert len(commands) == 1 and parsed(*commands[0].split()).loss == "balanced_softmax"


def test_it_says_what_it_is_for_on_one_screen():
    """All that a newcomer needs stands in the first 50 lines, in this order."""
    screen = "\n".join(README.splitlines()[:50])
    parts = ("What it does for you", "A setting to start with", "Load and predict",
             "When not to use it")  # fmt: skip
    places = [screen.index(f"**{part}**") for part in parts]
    assert places == sorted(places)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a trained network in runs/photos and an image, as examples name them."""
    place = tmp_path_factory.mktemp("place")
    photos = place / "new-photos"
    photos.mkdir()
    Image.new("RGB", (40, 30), "red").save(place / "cat.jpg")
    Image.new("RGB", (30, 40), "blue").save(photos / "dog.jpg")
    backbone = create("cifar_resnet8", 2)
    example = torch.zeros(2, 3, 32, 32)
    model = elf_fast.from_backbone(backbone, ["layer1"], 2, example_input=example)
    elf_fast.save(model, place / "runs" / "photos", class_names=["cat", "dog"],
                  transform=Preprocessing(32))  # fmt: skip
    return place


def test_the_examples_of_predict_run(capsys, place, monkeypatch):
    """Of its section on Python; the others need downloads."""
    monkeypatch.chdir(place)
    page = (ROOT / "docs" / "predict.md").read_text()
    page = page[page.index("## In Python") : page.index("## What `load` opens")]
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    cat, dog = capsys.readouterr().out.splitlines()
    assert cat.split()[0] in ("cat", "dog") and dog.startswith("new-photos/dog.jpg ")


def test_the_options_on_the_page_of_predict_exist(capsys):
    page = (ROOT / "docs" / "predict.md").read_text()
    named = set(re.findall(r"`(--[a-z-]+)", page)) - {"--amp", "--loss", "--share"}
    with pytest.raises(SystemExit):
        cli.main(["predict", "--help"])
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    assert len(named) == 7 and named <= known
