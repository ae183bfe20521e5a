"""`elf_fast.load`: a trained network from files, without the data that it was trained on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checks, criteria
from ..criteria import Score
from ..data import Preprocessing
from ..exit_settings import classes_of
from ..modules import ELF
from . import building, opening
from .datasets import digit_preprocessing, preprocessing
from .description import DEMO, RUN, Facts, check_config, facts
from .files import CheckpointError


def load(
    path: str | os.PathLike[str],
    *,
    model: ELF | None = None,
    criterion: str | Score | None = None,
    device: str | torch.device | None = None,
) -> ELF:
    """The trained network in `path`, in evaluation mode, with class names, the preprocessing of
    images, and thresholds. Nothing that a file says is executed, and nothing is downloaded.

    The result has the attributes `class_names` (C texts), `class_counts` (training images of each
    class; empty if unknown), `transform` (a `data.Preprocessing`, None if unknown) and `policy`.

    Args:
        path: a folder that `elf_fast.save` wrote, a run's folder, the demo's, a run's checkpoint, a
            file of weights, or a snapshot from the Hugging Face Hub. An interrupted run gives its
            newest good checkpoint. Averaged weights are preferred.
        model: a network of your own code that takes the weights; it is changed and returned.
            Needed only if `save` could not describe the network.
        criterion: the function that the network's exits used, if it was one: no file holds it.
        device: where the network goes; the CPU if None.

    Raises:
        CheckpointError: a file is missing, damaged, from another network or of another kind, or
            does not fit `model`; the message names it.
        TypeError, ValueError: an argument is invalid, or the policy beside the weights is damaged
            or for others.

    Example:
        >>> model = elf_fast.load("runs/photos")
        >>> out = model(model.transform.read("cat.jpg")[None])
        >>> model.class_names[out.prediction], out.confidence.item(), out.exit_index.item()
    """
    place = _checked(path)
    if model is not None and not isinstance(model, ELF):
        raise TypeError(f"model: expected an elf_fast.ELF, got {checks.describe(model)}")
    target = checks.device(str(device)) if device is not None else torch.device("cpu")
    weights, metadata = opening.read(place)
    if place.is_dir():
        check_config(place, metadata)
    named = _named_criterion(metadata)
    if criterion is not None and named not in (None, criterion):
        raise ValueError(
            f"criterion: expected none for a network whose thresholds are for {named}, got "
            f"{criterion!r}"
        )
    found = _facts(place, metadata, model)
    if model is None:
        model = building.build(place, metadata, criterion)
        model.origin = {name: value for name, value in metadata.items() if name != "preprocessing"}
    else:
        building.set_criterion(model, criterion or named)
    opening.load_weights(model, _with_own_parts(model, weights), place)
    model.class_names, model.class_counts, model.transform = found
    policy = opening.policy_beside(place)
    if policy is not None:
        opening.apply_policy(model, policy)
    return model.eval().to(target)


def _checked(path: Any) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected a folder or a file, got {checks.describe(path)}")
    place = Path(path)
    if "\0" in str(place):
        raise ValueError(f"path: expected a path without NUL characters, got {str(place)!r}")
    if os.path.exists(place):  # unlike Path's own, also for names that are too long
        return place
    hint = ""
    if isinstance(path, str) and path.count("/") == 1 and not path.startswith((".", "/", "~")):
        hint = (
            "; a repository of the Hugging Face Hub is downloaded first: "
            f"elf_fast.load(huggingface_hub.snapshot_download({path!r}))"
        )
    raise CheckpointError(f"{path}: expected a folder or a file of weights, found none{hint}")


def _facts(place: Path, metadata: Mapping[str, Any], model: ELF | None) -> Facts:
    """Class names, counts and preprocessing. Runs of earlier versions and the demo did not write
    all of them; they follow from the settings."""
    known = facts(place, metadata, None if model is None else classes_of(model.heads))
    if known.transform is not None:
        return known
    transform: Preprocessing | None = None
    if metadata.get("network") == DEMO:
        transform = digit_preprocessing(channels=1)
    elif metadata.get("network") == RUN:
        try:
            transform = preprocessing(building.settings(metadata, **_any_criterion(metadata)))
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{place}: {error}") from error
    return known._replace(transform=transform)


def _any_criterion(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The preprocessing does not depend on the criterion, which may be a function."""
    off = (criteria.by_name("confidence").off,)
    return {"criterion": "confidence", "thresholds": off, "train_thresholds": off}


def _named_criterion(metadata: Mapping[str, Any]) -> str | None:
    """The criterion that a file names; None if it was a function."""
    config = metadata.get("config")
    found = metadata.get("criterion", config.get("criterion") if isinstance(config, dict) else None)
    return found if isinstance(found, str) and found in criteria.TABLE else None


def _with_own_parts(model: ELF, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights to load into the model. Its loss and criterion, which may be the user's own code,
    keep their tensors."""
    own = model.state_dict()
    kept = {n: value for n, value in weights.items() if not n.startswith(building.OWN_PARTS)}
    return {**kept, **{n: v for n, v in own.items() if n.startswith(building.OWN_PARTS)}}
