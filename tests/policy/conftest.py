"""Runs are small and repeat bit by bit: one thread."""

from collections.abc import Iterator

import pytest
import torch

from elf_fast import ELF
from elf_fast.data import long_tailed_digits
from elf_fast.data.digits import DigitSplits
from elf_fast.demo import network
from elf_fast.demo import run as demo
from elf_fast.demo.loop import Schedule, train


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits() -> DigitSplits:
    return long_tailed_digits(50.0)


@pytest.fixture(scope="session")
def trained(digits: DigitSplits) -> ELF:
    """A small network with three exits, some of whose samples are sure at each of them."""
    torch.manual_seed(0)
    model = network.with_exits(10, widths=(4, 8, 8), thresholds=0.9, drop_exited=False)
    with demo.one_thread():
        train(model, digits.train, Schedule(epochs=12, learning_rate=1e-2), seed=0)
    return model
