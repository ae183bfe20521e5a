"""The flags of `elf-fast train`."""

from __future__ import annotations

import argparse
import math
from dataclasses import fields
from typing import get_args

import pytest
from run_cases import parsed

from elf_fast import cli
from elf_fast.cli import flags
from elf_fast.runs import plain
from elf_fast.runs.config import HINTS, TrainConfig


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


#: What each setting without a default may be given as, before `none` takes it back.
OPTIONAL = {
    "data_dir": "x", "lists": "x", "imbalance": 9.0, "img_size": 8, "transforms": "large",
    "exits": ["a"], "train_thresholds": [0.5], "drop_exited": True, "max_flops": 0.5,
    "drw_epoch": 1, "clip_grad": 1.0, "device": "cpu", "torchcompile": "eager",
    "checkpoint_steps": 3,
}  # fmt: skip


def test_none_takes_back_every_optional_setting():
    optional = [name for name, hint in HINTS.items() if type(None) in get_args(hint)]
    assert set(OPTIONAL) == set(optional)
    parser = argparse.ArgumentParser()
    flags.add_flags(parser)
    for name, value in OPTIONAL.items():
        flag = "--" + name.replace("_", "-")
        given = flags.from_arguments(parser.parse_args([flag, "none"]))
        dataset = {"dataset": "digits"} if name == "data_dir" else {"data_dir": "x"}
        made = plain.from_dict({**dataset, name: value, **given})
        assert getattr(made, name) is None
        assert plain.from_dict({**dataset, name: "none"}) == made  # as YAML says it


def test_every_setting_has_a_flag_and_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    for option in fields(TrainConfig):
        assert "--" + option.name.replace("_", "-") in text
        assert option.metadata["help"].split()[0] in text
    for flag in ("--keep-exited", "--no-exits", "--resume", "--config"):
        assert flag in text
