"""Runs are small and repeat bit by bit: one thread."""

from collections.abc import Iterator

import pytest
import torch

from elf_fast.data import long_tailed_digits
from elf_fast.data.digits import DigitSplits


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits() -> DigitSplits:
    return long_tailed_digits(50.0)
