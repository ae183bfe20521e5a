"""What describes a trained network, so that it is rebuilt without its training data.

It is one dict of plain values. It stands in the header of the file of weights, which is what
counts, and without the digests of the data also in `config.json`, for people and for the Hub.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .. import __version__, checks, digests
from ..data import Preprocessing
from ..policy import Policy, PolicyError
from ..policy import artefact as policies
from . import files
from .files import CheckpointError

FORMAT = "elf_fast model 1"
CONFIG = "config.json"
#: Who built a network: the entry "network". A run's settings and class counts rebuild it, the
#: demo's network has one form, `from_backbone` has arguments, and other code must be given.
RUN, DEMO, BACKBONE, OWN = "elf-fast train", "digits", "from_backbone", "own"
#: Entries that only the header of the weights holds: long, and not for people.
_HIDDEN = ("data",)
_LARGEST = 2**26  # bytes of a config.json


class Facts(NamedTuple):
    """What a description says beside how the network is built."""

    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]  # empty if they are not known
    transform: Preprocessing | None


def entries(facts: Facts) -> dict[str, Any]:
    """The entries of a description that every writer gives, beside "network"."""
    return {
        "format": FORMAT,
        "class_names": list(facts.class_names),
        "class_counts": list(facts.class_counts),
        "preprocessing": None if facts.transform is None else facts.transform.to_dict(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions of the libraries that build networks, of those that are installed."""
    found = {"elf_fast": __version__}
    for name in ("torch", "timm", "torchvision"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def facts(path: object, metadata: Mapping[str, Any], classes: int | None = None) -> Facts:
    """Checks and converts the entries of a description. What earlier versions did not write is
    taken from elsewhere: names are then numbers, and the caller finds the preprocessing.

    Args:
        path: for messages. classes: C, if the network tells it.

    Raises:
        CheckpointError: an entry is malformed, or entries contradict each other.
    """
    counts = metadata.get("class_counts", [])
    if not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
        raise CheckpointError(f"{path}: class_counts: expected integers, got {_shown(counts)}")
    names = metadata.get("class_names", [str(c) for c in range(classes or len(counts))])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: class_names: expected texts, got {_shown(names)}")
    C = classes or len(names)
    for entry, value in (("class_names", names), ("class_counts", counts or names)):
        if len(value) != C:
            raise CheckpointError(f"{path}: {entry}: expected {C}, one per class, got {len(value)}")
    transform, given = None, metadata.get("preprocessing")
    if given is not None:
        try:
            transform = Preprocessing.from_dict(given)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}") from error
    return Facts(tuple(names), tuple(counts), transform)


def write_weights(folder: Path, state: dict[str, Any], metadata: dict[str, Any], name: str) -> None:
    """Writes the file of weights `name` and its `config.json`. Those before them are kept as
    `*.previous.*`, and so is a policy that was made for other weights. If this process ends in
    between, the folder has no `config.json`, and opens."""
    path, policy = folder / CONFIG, folder / policies.FILE
    if path.exists():
        path.replace(files.previous(path))
    if policy.exists() and not _fits(policy, state):
        policy.replace(files.previous(policy))
    files.save(folder / name, state, metadata)
    files.write(path, readable(metadata))


def _fits(policy: Path, state: dict[str, Any]) -> bool:
    try:
        made_for = Policy.load(policy).weights_digest
    except PolicyError:
        return False
    return made_for in (None, digests.of_weights(state))


def readable(metadata: Mapping[str, Any]) -> bytes:
    """The content of `config.json`."""
    shown = {name: value for name, value in metadata.items() if name not in _HIDDEN}
    return json.dumps(shown, indent=1, sort_keys=True).encode() + b"\n"


def check_config(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Checks that the folder's `config.json`, if it has one, belongs to its weights.

    Raises:
        CheckpointError: an entry differs from the description in the weights; the message names
            the first.
    """
    path = folder / CONFIG
    if not path.exists():
        return
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST:,} bytes")
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON ({error})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected entries with names, got {_shown(found)}")
    expected = json.loads(readable(metadata))
    for name in sorted({*expected, *found}):
        if name not in found or name not in expected or found[name] != expected[name]:
            raise CheckpointError(
                f"{path}: {name}: expected {_shown(expected.get(name))} as in the weights, got "
                f"{_shown(found.get(name))}; the files of two networks are mixed, or it was edited"
            )


def _shown(value: Any) -> str:
    text = "none" if value is None else repr(value)
    return checks.printable(text if len(text) <= 100 else text[:97] + "...")
