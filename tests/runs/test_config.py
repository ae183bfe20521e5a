"""The settings of a run: conversion and checks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from run_cases import DIGITS

from elf_fast.data.preprocessing import CIFAR_MEAN, IMAGENET_MEAN
from elf_fast.runs import datasets, plain
from elf_fast.runs.config import TrainConfig

pytest.importorskip("yaml")


@pytest.mark.parametrize(
    "values, error, message",
    [
        ({"epoch": 3}, ValueError, "epoch: expected a setting .*; near names: epochs"),
        ({"epochs": 2.5}, TypeError, "epochs: expected an integer, got 2.5"),
        ({"epochs": "many"}, TypeError, "epochs: expected an integer, got 'many'"),
        ({"epochs": True}, TypeError, "epochs: expected an integer, got True"),
        ({"lr": "fast"}, TypeError, "lr: expected a number, got 'fast'"),
        ({"lr": None}, TypeError, "lr: expected a number, got None"),
        ({"lr": -1.0}, ValueError, "lr: expected a finite number >= 0.0, got -1.0"),
        ({"amp": "yes"}, TypeError, "amp: expected true or false, got 'yes'"),
        ({"model": 3}, TypeError, "model: expected a text, got 3"),
        ({"loss": "ce"}, ValueError, "loss: expected one of cross_entropy, .*, got 'ce'"),
        ({"thresholds": [0.5, "x"]}, TypeError, "thresholds: expected a number, got 'x'"),
        ({"decay_milestones": [True]}, TypeError, "decay_milestones: expected an integer, got Tr"),
        ({"model_kwargs": ["a"]}, ValueError, "model_kwargs: expected KEY=VALUE, got 'a'"),
        ({"batch_size": 0}, ValueError, "batch_size: expected an integer >= 1, got 0"),
        ({"momentum": 2}, ValueError, r"momentum: expected a number in \[0.0, 1.0\], got 2.0"),
        ({"model_kwargs": None}, ValueError, "model_kwargs: expected KEY=VALUE, got None"),
        ({"model_kwargs": ["a=[1"]}, ValueError, r"KEY=VALUE with a YAML value, got 'a=\[1'"),
        ({"dataset": "folder"}, ValueError, "data_dir: expected a folder of images .*, got none"),
        ({"max_flops": 0.5, "calibrate": False}, ValueError, "max_flops: expected none without"),
        ({"drw_epoch": 9, "epochs": 9}, ValueError,
         "drw_epoch: expected an epoch below epochs = 9, got 9"),
        ({"dataset": "Places-LT", "data_dir": "x", "imbalance": 9}, ValueError,
         "imbalance: expected none for Places-LT"),
        ({"dataset": "lists", "data_dir": "x", "validation_fraction": 0.1}, ValueError,
         "validation_fraction: expected none for lists, whose lists say"),
        ({"dataset": "cifar10", "data_dir": "x", "img_size": 64}, ValueError,
         "img_size: expected 32 for cifar10 .* got 64"),
        ({"train_threshold": 0.3, "train_thresholds": 0.6}, ValueError,
         "^train_thresholds: expected every key once, got it as train_threshold, its old name"),
        ({"dataset": "folder", "data_dir": "x", "lists": "y"}, ValueError,
         "lists: expected None for folder, got y"),
        ({"transforms": "small"}, ValueError, "transforms: expected None for digits, got small"),
        ({"thresholds": 7.0}, ValueError, r"thresholds: expected values in \[0, 1\], .* got 7.0"),
        ({"train_thresholds": [[0.5, math.nan]]}, ValueError, "train_thresholds: .* got nan"),
        ({"criterion": "entropy", "thresholds": math.inf}, ValueError, "or -inf to switch"),
        ({"thresholds": None}, TypeError, "thresholds: expected a number, got None"),
        ({"thresholds": [0.9, None]}, TypeError, "thresholds: expected a number, got None"),
        ({"criterion": "max"}, ValueError, "criterion: expected one of confidence, .* got 'max'"),
        ({"torchcompile": "c"}, ValueError, "torchcompile: expected a backend of"),
        ({"layer_decay": 0.0}, ValueError, "layer_decay: expected positive finite numbers, got 0"),
        ({"layer_decay": 1.5}, ValueError, r"layer_decay: expected a number in \[0.0, 1.0\], got"),
        ({"mixup": -1}, ValueError, r"mixup: expected a number in \[0.0, 1000000.0\], got -1.0"),
        ({"cutmix": math.inf}, ValueError, "cutmix: expected a number in .* got inf"),
        ({"pretrained": True, "init_from": "a.pth"}, ValueError,
         "init_from: expected none with pretrained weights, got a.pth"),
        ({"class_weights": "a.csv", "loss": "class_balanced"}, ValueError,
         "class_weights: expected none for the loss class_balanced, which computes its own"),
        ({"hflip": 0.0}, ValueError, "hflip: expected 0.5 for digits, got 0.0"),
        ({"mean": [0.5, 0.5, 0.5]}, ValueError, r"mean: expected None for digits, got \(0.5"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(values, error, message):
    with pytest.raises(error, match=message):
        plain.from_dict({"dataset": "digits", **values})


@pytest.mark.parametrize(
    "values, message",
    [
        ({"mean": 0.5}, "mean: expected 3 numbers, of red, green and blue, got 1"),
        ({"std": [0.5, 0.0, 0.5]}, "std: expected a number in .* got 0.0"),
        ({"interpolation": "cubic"}, "interpolation: expected one of nearest, .* got 'cubic'"),
        ({"hflip": 1.5}, r"hflip: expected a number in \[0.0, 1.0\], got 1.5"),
        ({"reprob": -0.5}, r"reprob: expected a number in \[0.0, 1.0\], got -0.5"),
        ({"scale": 0.5}, r"scale: expected two shares, 0 < smallest <= largest <= 1, got \(0.5,"),
        ({"scale": [0.5, 0.2]}, r"scale: expected two shares, .* got \(0.5, 0.2\)"),
        ({"scale": [0.0, 1.0]}, r"scale: expected two shares, .* got \(0.0, 1.0\)"),
        ({"scale": [0.5, 1.5]}, "scale: expected a number in .* got 1.5"),
        ({"auto_augment": "rand"}, "auto_augment: expected one of autoaugment, .* got 'rand'"),
    ],
)  # fmt: skip
def test_wrong_settings_of_images_are_named(values, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        plain.from_dict({"data_dir": "photos", **values})


def test_images_are_prepared_as_the_weights_want_them():
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    config = TrainConfig(data_dir="a", img_size=32, model="timm/tf_efficientnet_lite0")
    for changes, mean, interpolation in (
        ({}, IMAGENET_MEAN, "bilinear"),  # as in runs of earlier versions
        ({"transforms": "small"}, CIFAR_MEAN, "bilinear"),
        ({"pretrained": True}, (0.5, 0.5, 0.5), "bicubic"),
        ({"pretrained": True, "mean": (0.1, 0.2, 0.3)}, (0.1, 0.2, 0.3), "bicubic"),
        ({"interpolation": "lanczos"}, IMAGENET_MEAN, "lanczos"),
    ):
        made = datasets._transforms(replace(config, **changes))
        assert (made.evaluate.mean, made.evaluate.interpolation) == (mean, interpolation)
        (normalise,) = [t for t in made.train.transforms if hasattr(t, "std")]
        assert tuple(normalise.mean) == mean
    idle = replace(config, transforms="small", scale=(0.5, 1.0), interpolation="bicubic")
    assert idle.without_effect() == [
        "scale (needs transforms large)", "interpolation (needs transforms large)"
    ]  # fmt: skip
    mixed = replace(config, mixup=0.2, train_thresholds=0.5)
    assert mixed.without_effect() == ["train_thresholds (needs no mixup and cutmix)"]


@pytest.mark.parametrize(
    "given, kept",
    [
        ({"thresholds": 0.5}, {"thresholds": (0.5,)}),
        ({"thresholds": [0.5, "inf"]}, {"thresholds": (0.5, math.inf)}),
        ({"thresholds": [[0.5, 0.6], "0.7,0.8"]}, {"thresholds": ((0.5, 0.6), (0.7, 0.8))}),
        ({"train_threshold": 0.3}, {"train_thresholds": (0.3,)}),  # its name in earlier versions
        ({"exits": []}, {"exits": ()}),
        ({"output": Path("a") / "b"}, {"output": "a/b"}),
        ({"lr": 1}, {"lr": 1.0}),
        ({"lr": np.float64(0.5)}, {"lr": 0.5}),
    ],
)
def test_values_become_those_of_the_annotation(given, kept):
    settings = plain.from_dict({"dataset": "digits", **given})
    for name, value in kept.items():
        assert getattr(settings, name) == value and type(getattr(settings, name)) is type(value)


@pytest.mark.parametrize(
    "changes",
    [{"loss": "cross_entropi"}, {"sampler": "balanced"}, {"sched": "linear"}, {"model_kwargs": 3},
     {"epochs": 0}, {"amp_dtype": "int8"}],
)  # fmt: skip
def test_settings_made_in_python_are_checked_like_those_of_a_file(changes):
    (name,) = changes
    with pytest.raises((ValueError, TypeError), match=f"{name}: expected "):
        TrainConfig(dataset="digits", **changes)
    with pytest.raises((ValueError, TypeError), match=f"{name}: expected "):
        replace(DIGITS, **changes)
