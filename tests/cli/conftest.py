"""What the tests of this folder share."""

from pathlib import Path

import pytest
import torch
from run_cases import FLAGS, coloured_images

from elf_fast import cli


@pytest.fixture(autouse=True)
def _one_thread(one_thread) -> None:
    """For every test of this folder."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Images of three classes in train, val and test."""
    counts = {"train": (60, 24, 10), "val": (8, 8, 8), "test": (8, 8, 8)}
    return coloured_images(tmp_path_factory.mktemp("images"), counts)


@pytest.fixture(scope="session")
def run(folder: Path, tmp_path_factory) -> Path:
    """A finished run on `folder`, with a setting from a file."""
    output = tmp_path_factory.mktemp("runs") / "run"
    settings = output.parent / "settings.yaml"
    settings.write_text("epochs: 99\nseed: 3\n")
    torch.set_num_threads(1)
    assert cli.main(["train", "-c", str(settings), "--data-dir", str(folder), "--output",
                     str(output), *FLAGS]) == 0  # fmt: skip
    return output
