"""Converts settings to plain values (dicts, strict JSON and YAML) and back."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import checks, criteria
from . import strict_yaml
from .config import HINTS, SUBSETTABLE, TrainConfig

#: Settings that had other names in earlier versions.
_RENAMED = {"train_threshold": "train_thresholds"}
#: What stands in files before the name of a criterion that is a function.
CALLABLE = "callable "


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """The settings from keys and plain values, as YAML and the command line give them.

    Raises:
        ValueError, TypeError: an unknown key, or a value that does not fit.
    """
    found = _renamed(values)
    if str(found.get("criterion")).startswith(CALLABLE):
        raise ValueError(
            f"criterion: the run used {found['criterion']!r}, a function that files cannot hold; "
            "in Python pass it as criterion="
        )
    for name in found:
        if name not in HINTS:
            near = difflib.get_close_matches(str(name), HINTS)
            hint = f"; near names: {', '.join(near)}" if near else ""
            raise ValueError(f"{name}: expected a setting of elf-fast train, got none{hint}")
    return TrainConfig(**found)


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of one source, such as a file, under the names of this version."""
    for old, name in _RENAMED.items():
        if old in values and name in values:
            raise ValueError(f"{name}: expected every key once, got it as {old}, its old name, too")
    return {_RENAMED.get(name, name): value for name, value in values.items()}


def from_run(values: Mapping[str, Any], **overrides: Any) -> TrainConfig:
    """The settings that a run recorded, with some changed. Runs of before `exif_orientation` did
    not turn photos, and runs of earlier versions may name folders that their data set does not
    read.

    Raises:
        ValueError, TypeError: as `from_dict`.
    """
    dataset = values.get("dataset")
    is_fixed = dataset in ("digits", "cifar10", "cifar100")  # must be the default
    recorded = {"exif_orientation": is_fixed, **_renamed(values)}
    if dataset in SUBSETTABLE:
        recorded["lists"] = None
    if dataset == "digits":
        recorded["data_dir"] = None
    return from_dict({**recorded, **_renamed(overrides)})


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """All settings as plain values, which YAML and strict JSON hold; `from_dict` reads them."""
    names = (field.name for field in dataclasses.fields(config))
    return {name: _plain(getattr(config, name)) for name in names}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if callable(value):
        return CALLABLE + criteria.find(value).name
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def load_yaml(path: Path) -> dict[str, Any]:
    """The settings that a YAML file names.

    Raises:
        ValueError: the file is not the YAML that `strict_yaml` reads, or not a table of keys and
            values, or it gives a key under its old and its new name.
    """
    with open(path, "rb") as file:
        content = file.read(strict_yaml.LARGEST + 1)
    try:
        values = strict_yaml.parse(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected `key: value` lines, got {checks.describe(values)}")
    return _renamed(values)


def to_yaml(config: TrainConfig) -> str:
    import yaml

    values = to_dict(config)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    # PyYAML turns some of Unicode's line separators in texts into others.
    if strict_yaml.parse(text, math.inf) != values:
        text = yaml.safe_dump(values, sort_keys=False)
    return text
