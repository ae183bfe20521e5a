"""What the tests of this folder share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import DIGITS, QUIET

from elf_fast.training.trainer import train


@pytest.fixture(autouse=True)
def _one_thread(one_thread) -> None:
    """For every test of this folder."""


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """(folder, results) of a finished run on digits."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    results = train(replace(DIGITS, epochs=2, output=str(folder)), console=QUIET)
    torch.set_num_threads(before)
    return folder, results
