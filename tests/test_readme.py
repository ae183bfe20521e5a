"""The README's example runs as it stands. Its links: test_docs.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from run_cases import FLAGS, coloured_images, parsed

from elf_fast import cli

pytest.importorskip("torchvision")
README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_is_an_example():
    assert BLOCKS


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder that holds a run in runs/photos and an image cat.jpg."""
    from PIL import Image

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
