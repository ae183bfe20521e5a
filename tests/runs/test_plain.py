"""Settings to YAML and JSON and back."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from run_cases import DIGITS

from elf_fast.runs import plain
from elf_fast.runs.config import TrainConfig

pytest.importorskip("yaml")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"exits": ("layer1",), "thresholds": (0.5, math.inf), "lr": 1e-5},
        {"exits": ()},
        {"thresholds": ((0.5, 0.9), (0.4, math.inf))},
    ],
)
def test_settings_survive_yaml(changes, tmp_path):
    settings = replace(DIGITS, **changes)
    (tmp_path / "a.yaml").write_text(plain.to_yaml(settings))
    assert plain.from_dict(plain.load_yaml(tmp_path / "a.yaml")) == settings
    strict = json.dumps(plain.to_dict(settings), allow_nan=False)
    assert plain.from_dict(json.loads(strict)) == settings


def test_yaml_takes_numbers_as_people_write_them(tmp_path):
    (tmp_path / "a.yaml").write_text("dataset: digits\nlr: 1e-3\nexits: layer1\nmin_lr: 0\n")
    assert plain.from_dict(plain.load_yaml(tmp_path / "a.yaml")) == TrainConfig(
        dataset="digits", lr=1e-3, exits=("layer1",), min_lr=0.0
    )


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"data_dir: \xff\n")
    with pytest.raises(ValueError, match="a.yaml: expected YAML: unacceptable character"):
        plain.load_yaml(tmp_path / "a.yaml")


def test_a_new_name_overrides_an_old_one_of_another_source(tmp_path):
    recorded = {"data_dir": "a", "train_threshold": 0.3}
    assert plain.from_run(recorded, train_thresholds=0.6).train_thresholds == (0.6,)
    assert plain.from_run({"data_dir": "a"}, train_threshold=0.6).train_thresholds == (0.6,)
    (tmp_path / "old.yaml").write_text("train_threshold: 0.3")
    assert plain.load_yaml(tmp_path / "old.yaml") == {"train_thresholds": 0.3}


def surest(logits):
    return logits.amax(dim=1)


def test_a_criterion_that_is_a_function_is_asked_for_again(tmp_path):
    settings = replace(DIGITS, criterion=surest, thresholds=(5.0,))
    (tmp_path / "a.yaml").write_text(plain.to_yaml(settings))
    saved = plain.load_yaml(tmp_path / "a.yaml")
    with pytest.raises(ValueError, match="criterion: the run used 'callable surest'"):
        plain.from_dict(saved)
    assert plain.from_dict({**saved, "criterion": surest}) == settings
