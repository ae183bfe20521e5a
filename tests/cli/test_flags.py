"""The flags of `elf-fast train`."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
from run_cases import parsed

from elf_fast import cli
from elf_fast.runs.config import TrainConfig


def test_flags_become_settings_of_the_right_type():
    given = parsed(*"--data-dir x --epochs 3 --lr 1e-3 --amp --keep-exited --thresholds 0.5 inf "
                  "--exits layer1 layer2 --model-kwargs drop_rate=0.1 name=a".split())  # fmt: skip
    assert given == TrainConfig(
        data_dir="x", epochs=3, lr=1e-3, amp=True, drop_exited=False, thresholds=(0.5, math.inf),
        exits=("layer1", "layer2"), model_kwargs={"drop_rate": 0.1, "name": "a"},
    )  # fmt: skip
    assert parsed(
        *"--data-dir x --drop-exited --no-calibrate --torchcompile".split()
    ) == TrainConfig(data_dir="x", drop_exited=True, calibrate=False, torchcompile="inductor")
    assert parsed(*"--data-dir x --no-exits".split()).exits == ()
    assert parsed("--data-dir", "x") == TrainConfig(data_dir="x")


def test_every_setting_has_a_flag_and_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    for option in fields(TrainConfig):
        assert "--" + option.name.replace("_", "-") in text
        assert option.metadata["help"].split()[0] in text
    for flag in ("--keep-exited", "--no-exits", "--resume", "--config"):
        assert flag in text
