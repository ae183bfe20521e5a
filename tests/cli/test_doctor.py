"""`elf-fast doctor`."""

from __future__ import annotations

import torch

import elf_fast
from elf_fast import cli


def test_doctor_says_what_serves_each_device(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert elf_fast.__version__ in printed and torch.__version__ in printed
    assert all(line in printed for line in elf_fast.report().values())
