"""Which data a run was made of: a short description for the run's metadata, and how other data
differ from it."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Mapping
from typing import Any

from ..data import LabelledImages, Splits
from .config import TrainConfig
from .files import CheckpointError
from .plain import to_dict

PARTS = ("train", "validation", "test")
#: Settings that choose training images from those of the data set.
_CHOICE = ("imbalance", "imbalance_profile", "data_seed")
_SHOWN = 5  # classes that a message names
_DIGITS = 8  # hexadecimal digits of the digest of a class


def describe(splits: Splits) -> dict[str, Any]:
    """class_names, class_counts and data, for the metadata of a run. data has for every part None
    or, by class, the number of samples and a digest of their keys (file names below the folder,
    which may move), and for training a digest of their order, which a resumed epoch needs."""
    C = len(splits.class_names)
    data: dict[str, Any] = {}
    for name in PARTS:
        part = getattr(splits, name)
        data[name] = None if part is None else _part(part, C)
    data["train"]["order"] = _digest(_keys(splits.train), 2 * _DIGITS)
    names = _in_utf8(splits.class_names)
    return {"class_names": names, "class_counts": splits.class_counts, "data": data}


def describe_test(recorded: Mapping[str, Any], test: LabelledImages) -> dict[str, Any]:
    """`describe` for a test part alone. Everything else is as the run recorded it."""
    names, counts = recorded["class_names"], recorded["class_counts"]
    data = {**(recorded.get("data") or {}), "test": _part(test, len(names))}
    return {"class_names": _in_utf8(names), "class_counts": counts, "data": data}


def _in_utf8(names: list[str]) -> list[str]:
    """Names of folders as Python reads them in a locale of UTF-8. In the locale C it may read the
    bytes of letters beyond ASCII as surrogates."""
    return [name.encode(errors="surrogateescape").decode(errors="surrogateescape")
            for name in names]  # fmt: skip


def check_metadata(path: object, metadata: Mapping[str, Any]) -> None:
    """Raises CheckpointError unless the metadata have the entries of a run, each of its kind.
    Earlier versions wrote no class_names and data; later ones may write more."""
    get = metadata.get
    entries = {
        "config": isinstance(get("config"), dict),
        "class_counts": _are(int, get("class_counts")),
        "seed": isinstance(get("seed"), int),
        "class_names": _are(str, get("class_names", [])),
        "data": _is_data(get("data") or {}),
    }
    for name, fits in entries.items():
        if not fits:
            raise CheckpointError(
                f"{path}: expected metadata of a run with {name}, got {reprlib.repr(get(name))}"
            )


def _is_data(data: Any) -> bool:
    parts = [data.get(name) for name in PARTS] if isinstance(data, dict) else ["no dict"]
    return all(
        _are(int, part.get("counts")) and isinstance(part.get("digests", ""), str)
        if isinstance(part, dict)
        else part is None
        for part in parts
    )


def _are(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def fingerprint(described: Mapping[str, Any]) -> str:
    """A digest of a description."""
    return _digest([json.dumps(described, sort_keys=True).encode()], 2 * _DIGITS)


def _keys(part: LabelledImages) -> list[bytes]:
    """[N] what the samples of a part are called; nothing for data sets of other kinds."""
    return part.keys() if hasattr(part, "keys") else [b""] * len(part)


def _part(part: LabelledImages, classes: int) -> dict[str, Any]:
    keys = _keys(part)
    by_class: list[list[bytes]] = [[] for _ in range(classes)]
    for key, target in zip(keys, part.targets.tolist(), strict=True):
        by_class[target].append(key)
    return {
        "counts": [len(of_class) for of_class in by_class],
        "digests": "".join(_digest(sorted(of_class), _DIGITS) for of_class in by_class),
    }


def _digest(keys: list[bytes], digits: int) -> str:
    return hashlib.blake2b(b"\0".join(keys), digest_size=digits // 2).hexdigest()


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """How data differ from those of a run: a sentence by "classes" or by part.

    Args:
        was: the metadata of the run. Earlier versions recorded no data; then class names and the
            training counts are compared.
        now: from `describe`.
    """
    names = _in_utf8(was.get("class_names", now["class_names"]))
    if names != now["class_names"]:
        return {"classes": f"classes: {_class_names(names, now['class_names'])}"}
    recorded = was.get("data") or {"train": {"counts": was["class_counts"]}}
    found = {}
    for part in PARTS:
        if part in recorded:
            text = _difference(recorded[part], now["data"][part], names)
            if text is not None:
                found[part] = f"{part}: {text}"
    return found


def _class_names(was: list[str], now: list[str]) -> str:
    gone, added = (
        [name for name in one if name not in other]
        for one, other in ((was, set(now)), (now, set(was)))
    )
    if not gone and not added:
        return f"expected the run's order, {_first(was)}, got {_first(now)}"
    changes = [f"{text} {_first(names)}" for text, names in (("without", gone), ("with", added))
               if names]  # fmt: skip
    return f"expected the run's {len(was):,} classes, got {len(now):,}: {', '.join(changes)}"


def _difference(
    was: Mapping[str, Any] | None, now: Mapping[str, Any] | None, names: list[str]
) -> str | None:
    """None if a part is as it was. `was` may lack all but the counts."""
    if was is None or now is None:
        if was is now:
            return None
        wanted = "no such part, as in the run" if was is None else f"the run's {_images(was)}"
        return f"expected {wanted}, got {'none' if now is None else _images(now)}"
    if all(was.get(entry, value) == value for entry, value in now.items()):
        return None
    if len(was["counts"]) != len(now["counts"]):
        return f"expected the run's {len(was['counts'])} classes, got {len(now['counts'])}"
    changes = []
    for c, name in enumerate(names):
        more = now["counts"][c] - was["counts"][c]
        place = slice(_DIGITS * c, _DIGITS * (c + 1))
        if more:
            changes.append(f"{name} {abs(more):,} {'more' if more > 0 else 'fewer'}")
        elif "digests" in was and was["digests"][place] != now["digests"][place]:
            changes.append(f"{name} equally many, but other files")
    how = _first(changes) if changes else "the same in another order"
    return f"expected the run's {_images(was)}, got {sum(now['counts']):,}: {how}"


def _images(part: Mapping[str, Any]) -> str:
    return f"{sum(part['counts']):,} images"


def _first(items: list[str]) -> str:
    more = len(items) - _SHOWN
    return ", ".join(items[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def check_resumed(
    path: object, was: Mapping[str, Any], now: Mapping[str, Any], config: TrainConfig
) -> None:
    """Checks that a run resumes on its data. Training images may differ if the settings that choose
    them do.

    Raises:
        CheckpointError: the data differ, or `was` are not the metadata of a run.
    """
    check_metadata(path, was)
    found = differences(was, now)
    given, settings = was["config"], to_dict(config)
    if any(given.get(name, settings[name]) != settings[name] for name in _CHOICE):
        found.pop("train", None)
    if found:
        raise CheckpointError(_unlike(path, found) + "\nOn other data, start a new run.")


def check_evaluated(
    path: object,
    was: Mapping[str, Any],
    now: Mapping[str, Any],
    config: TrainConfig,
    part: str,
    *,
    on_purpose: bool,
) -> list[str]:
    """Checks that a run is evaluated on its data, or on others with the same classes and training
    counts if the user named their place. Returns how these differ, in sentences.

    Args:
        part: the part to evaluate on.
        on_purpose: the user named the place of the data.

    Raises:
        CheckpointError: the data differ, or may hold images that were trained on.
    """
    found = differences(was, now)
    strict = {}
    if "classes" in found or was["class_counts"] != now["class_counts"]:
        strict = {name: text for name, text in found.items() if name in ("classes", "train")}
    found = {name: text for name, text in found.items() if name in (part, "test")}
    if strict:
        raise CheckpointError(_unlike(path, strict))
    if part in found and part == "validation" and config.validation_fraction:
        raise CheckpointError(
            f"{_unlike(path, found)}\nValidation images are held out of those of training; these "
            "may hold some that were trained on."
        )
    if found and not on_purpose:
        hint = "To evaluate on these, name their folder: --data-dir."
        raise CheckpointError(f"{_unlike(path, found)}\n{hint}")
    return list(found.values())


def _unlike(path: object, found: Mapping[str, str]) -> str:
    return "\n".join([f"{path}: expected the data that it was made with", *found.values()])
