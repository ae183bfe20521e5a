"""What the tests of this folder share."""

import pytest
import torch

from elf_fast import ELF
from elf_fast.data.digits import DigitSplits
from elf_fast.demo import run as demo
from elf_fast.demo.loop import Schedule, train
from elf_fast.runs import demo_network as network


@pytest.fixture(autouse=True)
def _one_thread(one_thread) -> None:
    """For every test of this folder."""


@pytest.fixture(scope="session")
def trained(digits: DigitSplits) -> ELF:
    """A small network with three exits, some of whose samples are sure at each of them."""
    torch.manual_seed(0)
    model = network.with_exits(10, widths=(4, 8, 8), thresholds=0.9, drop_exited=False)
    with demo.one_thread():
        train(model, digits.train, Schedule(epochs=12, learning_rate=1e-2), seed=0)
    return model
