"""Settings are checked where they are made: in the constructor, whichever way they come."""

from __future__ import annotations

import enum
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from run_cases import DIGITS, QUIET, parsed, refused

from elf_fast.runs import networks, plain, strict_yaml
from elf_fast.runs.config import TrainConfig
from elf_fast.runs.datasets import load_splits
from elf_fast.training import learner, schedule
from elf_fast.training import trainer as trainers
from elf_fast.training.processes import Processes
from elf_fast.training.trainer import Trainer

yaml = pytest.importorskip("yaml")


def messages(tmp_path: Path, name: str, value: object) -> set[str]:
    """What the constructor, `replace`, a YAML file and a flag say about a value."""
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"dataset": "digits", name: value}))
    words = map(str, value) if isinstance(value, list) else [str(value)]
    doors = (
        lambda: TrainConfig(dataset="digits", **{name: value}),
        lambda: replace(DIGITS, **{name: value}),
        lambda: plain.from_dict(plain.load_yaml(tmp_path / "a.yaml")),
        lambda: parsed("--dataset", "digits", f"--{name.replace('_', '-')}", *words),
    )
    said = set()
    for door in doors:
        with pytest.raises((ValueError, TypeError)) as error:
            door()
        said.add(str(error.value))
    return said


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("label_smoothing", 1.5, "label_smoothing: expected a number in [0.0, 1.0], got 1.5"),
        ("gamma", -0.5, "gamma: expected a finite number >= 0.0, got -0.5"),
        ("tau", math.nan, "tau: expected a finite number >= 0.0, got nan"),
        ("beta", 1.0, "beta: expected a number in [0, 1), got 1.0"),
        ("model_ema_decay", 1.0, "model_ema_decay: expected a number in [0, 1), got 1.0"),
        ("ldam_scale", 0.0, "ldam_scale: expected positive finite numbers, got 0.0"),
        ("clip_grad", 0.0, "clip_grad: expected positive finite numbers, got 0.0"),
        ("exit_weights", [1.0, -1.0], "exit_weights: expected a finite number >= 0.0, got -1.0"),
        ("exit_weights", [0.0, 0.0],
         "exit_weights: expected one above 0, or nothing learns, got (0.0, 0.0)"),
        ("seed", 2**63, f"seed: expected an integer in [0, {2**63 - 1}], got {2**63}"),
        ("data_seed", 2**32, f"data_seed: expected an integer in [0, {2**32 - 1}], got {2**32}"),
        ("epochs", 10**15, f"epochs: expected an integer of at most {2**31 - 1}, got {10**15}"),
        ("workers", 10**6, "workers: expected an integer in [0, 1024], got 1000000"),
        ("decay_milestones", [-2], "decay_milestones: expected an integer >= 0, got -2"),
        ("decay_milestones", [7, 9, 7],
         "decay_milestones: expected every one once, got (7, 9, 7)"),
        ("exits", ["layer1", "layer1"],
         "exits: expected every one once, got ('layer1', 'layer1')"),
        ("output", "", "output: expected a text of at least one character, got ''"),
        ("data_dir", "photos", "data_dir: expected None for digits, got photos"),
        ("lists", "splits", "lists: expected None for digits, got splits"),
        ("model", "a\0b", "model: expected UTF-8 text without NUL characters, got 'a\\x00b'"),
    ],
)  # fmt: skip
def test_every_door_says_the_same(name, value, message, tmp_path):
    assert messages(tmp_path, name, value) == {message}


@pytest.mark.parametrize(
    "values, message",
    [
        ({"sampler": np.array(["instance", "x"])}, "sampler: expected one of instance, "),
        ({"loss": ["focal"]}, "loss: expected one of cross_entropy, "),
        ({"sched": b"step"}, "sched: expected one of cosine, step, got b'step'"),
        ({"lr": 10**400}, "lr: expected a number of at most 64 bits, got one of 1329"),
        ({"thresholds": []}, "thresholds: expected at least one number, got ()"),
        ({"train_thresholds": [[]]}, "train_thresholds: expected at least one number, got ((),)"),
        ({"exit_weights": ()}, "exit_weights: expected at least one number, got ()"),
        ({"data_dir": "a\udce9"}, "data_dir: expected UTF-8 text without NUL"),
        ({"model_kwargs": {"a": math.inf}}, "model_kwargs.a: expected finite numbers, "),
        ({"model_kwargs": {"a": [{"b": {1, 2}}]}}, "model_kwargs.a: expected finite numbers, "),
        ({"model_kwargs": {"a": 2**70}}, "model_kwargs.a: expected a number of at most 64 bits"),
        ({"model_kwargs": {3: 1}}, "model_kwargs: a key: expected a text, got 3"),
        ({"model_kwargs": ["a=1", "a=2"]}, "model_kwargs: expected every key once, got 'a' again"),
        ({"model_kwargs": ["a=*b"]}, "model_kwargs: expected KEY=VALUE with a YAML value"),
    ],
)
def test_what_only_python_or_one_door_can_say_is_refused(values, message):
    with pytest.raises((ValueError, TypeError)) as error:
        TrainConfig(dataset="digits", **values)
    assert str(error.value).startswith(message)


def test_a_table_that_holds_itself_is_refused():
    options: dict = {}
    options["a"] = options
    with pytest.raises(ValueError, match="model_kwargs.a: expected at most 10 lists and tables"):
        replace(DIGITS, model_kwargs=options)


class Loss(str, enum.Enum):
    FOCAL = "focal"


def test_values_of_numpy_and_enums_become_plain(tmp_path):
    made = replace(
        DIGITS, epochs=np.int64(3), lr=np.float32(0.5), amp=np.bool_(True), sched=np.array("step"),
        loss=Loss.FOCAL, model=Path("cifar_resnet8"), thresholds=np.array([0.5, 0.75]),
        model_kwargs={"depths": (1, 2), "rate": np.float64(0.5)},
    )  # fmt: skip
    assert (made.epochs, made.lr, made.amp, made.sched) == (3, 0.5, True, "step")
    assert made.loss == "focal" and type(made.loss) is str and made.thresholds == (0.5, 0.75)
    assert made.model_kwargs == {"depths": [1, 2], "rate": 0.5}
    (tmp_path / "a.yaml").write_text(plain.to_yaml(made))
    assert plain.from_dict(plain.load_yaml(tmp_path / "a.yaml")) == made


numbers = st.floats(0, 1, exclude_max=True)
texts = st.text(min_size=1, max_size=5)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.binary(max_size=2),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=3,
)


@settings(max_examples=30, deadline=None)
@example({"output": "runs/a\x85b"})  # ends a line in YAML
@example({"data_dir": "\u2028", "model_kwargs": {"\u2029": ["\ufeff\r", " "]}})
@example({"model_kwargs": {"a": "0100", "b": "1:30", "<<": "<<"}})
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "output": texts, "model": texts, "data_dir": texts, "lr": st.floats(), "beta": numbers,
            "exits": st.lists(texts, max_size=2), "thresholds": st.lists(numbers) | numbers,
            "decay_milestones": st.lists(st.integers(0, 9), max_size=3), "seed": st.integers(),
            "model_kwargs": st.dictionaries(texts, values, max_size=2), "tau": st.integers(),
        },
    )
)  # fmt: skip
def test_what_is_accepted_survives_yaml_and_json(changes):
    try:
        made = TrainConfig(**{"data_dir": "photos", **changes})
    except (ValueError, TypeError):
        return
    assert plain.from_dict(strict_yaml.parse(plain.to_yaml(made))) == made
    strict = json.dumps(plain.to_dict(made), allow_nan=False)
    assert plain.from_dict(json.loads(strict)) == made


@pytest.mark.parametrize("name", ["sgdd", "lookahead_", "adahessian"])
def test_an_optimiser_that_cannot_train_is_named(name):
    model = networks.network(DIGITS, [9] * 10)
    with pytest.raises(ValueError, match=f"^opt: expected an optimiser .* got '{name}'"):
        schedule.optimizer(replace(DIGITS, opt=name), model)


@pytest.mark.parametrize("model", ["cifar_resnet7", "resnet51", "timm/"])
def test_the_name_of_a_network_is_called_model(model):
    with pytest.raises(ValueError, match="^model: (expected|depth)"):
        networks.network(replace(DIGITS, model=model), [9] * 10)


def test_settings_that_others_switch_off_are_named():
    made = replace(
        DIGITS, exits=(), thresholds=0.5, exit_weights=(0.5, 0.5, 1.0), conv_heads=True, gamma=3.0,
        min_lr=0.1, sched="step", decay_milestones=(1,), calibrate=False, skip_errors=True,
    )  # fmt: skip
    assert made.without_effect() == [
        "conv_heads (needs exits)", "thresholds (needs exits)", "calibrate (needs exits)",
        "gamma (needs loss focal)", "min_lr (needs sched cosine)",
        "skip_errors (needs images in files)", "exit_weights but the last (need exits)",
    ]  # fmt: skip
    assert DIGITS.without_effect() == []
    acting = replace(made, exits=None, loss="focal", sched="cosine", skip_errors=False)
    assert acting.without_effect() == ["decay_milestones (needs sched step)"]


def test_a_run_names_settings_that_its_optimiser_and_data_switch_off(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_train", lambda trainer: None)
    monkeypatch.setattr(trainers, "write_results", lambda *arguments, **options: {})
    splits = load_splits(DIGITS)
    monkeypatch.setattr(trainers, "load_splits", lambda config: replace(splits, validation=None))
    shown = io.StringIO()
    config = replace(DIGITS, momentum=0.5, val_interval=2, output=str(tmp_path))
    trainers.train(replace(config, opt="adamw"), console=Console(file=shown))
    (named,) = re.findall("settings without effect: (.*)", shown.getvalue())
    assert named == "momentum (needs an opt with momentum), val_interval (needs a validation part)"


@pytest.mark.parametrize(
    "settings, acts",
    [
        ({"dataset": "digits"}, True),
        ({"data_dir": "a", "imbalance": 9.0}, True),
        ({"data_dir": "a", "validation_fraction": 0.5}, True),
        ({"data_dir": "a"}, False),
        ({"dataset": "lists", "data_dir": "a", "lists": "b"}, False),
    ],
)
def test_a_seed_of_the_data_needs_something_to_choose(settings, acts):
    idle = TrainConfig(**settings, data_seed=3).without_effect()
    assert idle == ([] if acts else ["data_seed (needs imbalance or validation_fraction)"])


def test_runs_that_recorded_a_folder_that_was_not_read_go_on():
    recorded = {"dataset": "digits", "data_dir": "a", "lists": "b"}
    assert plain.from_run(recorded) == TrainConfig(dataset="digits")
    recorded = {"dataset": "folder", "data_dir": "a", "lists": "b", "exif_orientation": True}
    assert plain.from_run(recorded) == TrainConfig(data_dir="a")
    with pytest.raises(ValueError, match="^lists: expected None for folder, got c"):
        plain.from_run(recorded, lists="c")
    recorded["dataset"] = "lists"
    assert plain.from_run(recorded).lists == "b"


@pytest.mark.parametrize(
    "flag", [["--thresholds", "0.5"], ["--exit-weights", "1"], ["--conv-heads"]]
)
def test_flags_of_exits_beside_no_exits_are_refused(flag, capsys):
    said = refused(capsys, "train", "--dataset", "digits", "--model", "none", "--no-exits", *flag)
    assert f"{flag[0]}: expected none with --no-exits" in said


def test_the_largest_seeds_start_a_run(monkeypatch):
    monkeypatch.setattr(learner, "DistributedDataParallel", lambda model, device_ids: model)
    monkeypatch.setattr(Trainer, "_check_same_data", lambda trainer: None)
    config = replace(DIGITS, seed=2**63 - 1, data_seed=2**32 - 1)
    Trainer(config, Processes(torch.device("cpu"), rank=3, world_size=4), console=QUIET)
