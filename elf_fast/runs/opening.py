"""Opens the folder of a run, one of its checkpoints, or a file of weights."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, policy
from ..data import DataError, LabelledImages
from ..flops import Flops, count_flops
from ..groups import class_groups
from ..memory import is_out_of_memory
from ..modules import ELF
from . import checkpoints, contents, files
from .building import without_weights
from .config import TrainConfig
from .datasets import blank_image, load_splits, load_test
from .evaluation import autocast, check_read, evaluation_loader
from .files import CheckpointError
from .networks import network
from .plain import from_run

CHECKPOINTS = "checkpoints"
#: Settings that say where the data of a run are.
FOLDERS = ("data_dir", "lists")


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights, metadata) of a folder or a file. metadata["network"] says how the network is built:
    see `description`. metadata["checkpoint"] names the checkpoint that was read, if the weights are
    not those of a finished run.

    Args:
        path: a folder with weights, a run that has only checkpoints so far, one of its
            checkpoints, or a file of weights. Averaged weights are preferred.

    Raises:
        CheckpointError: there are no weights, or they are damaged.
    """
    if not path.is_dir():
        return files.load(path)
    if (path / checkpoints.MANIFEST).is_file():
        found: checkpoints.Checkpoint | None = checkpoints.load(path)
    elif (path / checkpoints.WEIGHTS).is_file():
        return files.load(path / checkpoints.WEIGHTS)
    else:
        found, refused = checkpoints.newest(path / CHECKPOINTS)
        if found is None:
            why = "; ".join(map(str, refused)) or "found none"
            raise CheckpointError(f"{path}: expected a run with weights or checkpoints: {why}")
    assert found is not None
    weights = found.weights if found.average is None else found.average
    return weights, {**found.metadata, "checkpoint": _named(found)}


def _named(found: checkpoints.Checkpoint) -> str:
    """Such as "checkpoint step-00000012, after 3 of 90 epochs, thresholds not calibrated yet"."""
    settings, position = found.metadata.get("config"), found.state.get("position")
    text = f"checkpoint {found.path.name}"
    if isinstance(settings, dict) and isinstance(position, dict):
        text += f", after {position.get('epoch')} of {settings.get('epochs')} epochs"
        if settings.get("calibrate") and settings.get("exits") != []:
            text += ", thresholds not calibrated yet"
    return text


def load_weights(model: ELF, weights: dict[str, Tensor], path: Path) -> None:
    """Loads the weights that were read from `path`.

    Raises:
        CheckpointError: they do not fit the model, or are NaN or infinite.
    """
    try:
        files.check_dtypes(model.state_dict(), weights)
        model.load_state_dict(weights)
    except (RuntimeError, ValueError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{path}: its weights do not fit the network of this version ({files.misfit(error)})"
        ) from error
    for name, value in weights.items():
        # Thresholds outside of stages and heads may be infinite.
        if name.startswith(("stages.", "heads.")) and not bool(value.isfinite().all()):
            raise CheckpointError(f"{path}: expected finite weights, got NaN or infinity in {name}")


class Opened(NamedTuple):
    """A run with its data and its network, on its device and in the run's weights."""

    config: TrainConfig
    part: str  # of the data, the one that was asked for
    images: LabelledImages  # of the part
    data: dict[str, Any]  # all parts, as `contents.describe` does
    model: ELF
    device: torch.device


def opened(
    path: Path,
    weights: dict[str, Tensor],
    metadata: dict[str, Any],
    parts: Sequence[str],
    **overrides: Any,
) -> Opened:
    """The run whose weights and metadata `read` returned, with the first of the `parts` that its
    data have.

    Args:
        overrides: settings that differ from the run's, such as data_dir. If they name another
            place of the data, its images may differ from the run's; stderr then says how.

    Raises:
        CheckpointError: weights, metadata or settings do not fit this version, or the data are not
            those of the run.
        ValueError, TypeError: the run's settings do not fit the data or this machine.
    """
    contents.check_metadata(path, metadata)
    try:
        config = from_run(located(path, metadata["config"]), **overrides)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    part, images, now = _images(path, config, metadata, parts)
    named = not set(FOLDERS).isdisjoint(overrides)
    for text in contents.check_evaluated(path, metadata, now, config, part, on_purpose=named):
        print(text, file=sys.stderr)
    try:
        device = checks.device(config.device)
    except ValueError:  # this machine lacks the device of the training
        if "device" in overrides:
            raise
        device = checks.device(None)
    # The run's weights replace pretrained ones, which might have to be downloaded.
    options = without_weights(config.model_kwargs)
    model = network(replace(config, model_kwargs=options), now["class_counts"])
    load_weights(model, weights, path)
    return Opened(config, part, images, now, model.to(device), device)


def located(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run with the folders of its data as paths from here. Earlier versions
    recorded them as they were given, relative to the folder in which the run was started. That
    folder follows from where the run lies, unless it moved; then they stay as they are.

    Args:
        path: the run's folder, or something in it.
    """
    output = settings.get("output")
    tail = Path(output).parts if isinstance(output, str) else ()
    here = Path(os.path.abspath(path))
    for folder in (here, *here.parents):
        if tail and folder.parts[-len(tail) :] == tail and not Path(*tail).is_absolute():
            start = Path(*folder.parts[: -len(tail)])
            break
    else:
        return settings
    found = {
        name: str(start / settings[name])
        for name in FOLDERS
        if isinstance(settings.get(name), str) and (start / settings[name]).exists()
    }
    return {**settings, **found}


def _images(
    path: Path, config: TrainConfig, metadata: dict[str, Any], parts: Sequence[str]
) -> tuple[str, LabelledImages, dict[str, Any]]:
    """(part, images, description of the data): the first of the parts that the data have. Without
    training images, a folder's test part is enough; stderr says that they were not compared."""
    try:
        splits = load_splits(config)
    except DataError:
        names = metadata.get("class_names") if "test" in parts else None
        test = None if names is None else load_test(config, names)
        if test is None:
            raise
        print(
            f"{config.data_dir}: no training images, so they were not compared with the run's",
            file=sys.stderr,
        )
        return "test", test, contents.describe_test(metadata, test)
    found = [part for part in parts if getattr(splits, part) is not None]
    if not found:
        wanted = " or ".join(parts)
        raise CheckpointError(f"{path}: expected a {wanted} part in its data, got none")
    return found[0], getattr(splits, found[0]), contents.describe(splits)


def policy_beside(path: Path) -> Path | None:
    """The file of the policy beside the weights that `read` reads from `path`, if there is one."""
    file = (path if path.is_dir() else path.parent) / policy.FILE
    is_for_these = path.is_dir() or path.name == checkpoints.WEIGHTS
    return file if is_for_these and file.is_file() else None


def apply_policy(model: ELF, file: Path) -> policy.Policy:
    """Sets the policy of a file and returns it.

    Raises:
        ValueError: it is damaged, or made for another network; the message names the file.
    """
    found = policy.Policy.load(file)
    try:
        model.apply_policy(found)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return found


class Evaluation(NamedTuple):
    """A network and the data to evaluate it on."""

    part: str  # "test", or "validation" if there is no test part
    seed: int
    model: ELF
    images: LabelledImages
    batches: Iterable[tuple[Tensor, Tensor]]  # of `images`
    class_names: list[str]  # [C]
    class_counts: list[int]  # [C] training images
    flops: Flops
    precision: Callable[[], AbstractContextManager]  # in which the network runs
    policy: Path | None = None  # the file whose thresholds are set; None: those of the weights
    checkpoint: str = ""  # which, if the weights are not those of a finished run


def evaluation(
    path: Path,
    weights: dict[str, Tensor],
    metadata: dict[str, Any],
    policy_file: Path | None = None,
    **overrides: Any,
) -> Evaluation:
    """What is needed to evaluate a run. The part is validation only if the data set has no test
    part.

    Args:
        policy_file: a policy to apply; None: the thresholds that the weights hold.
        overrides: as for `opened`, which also says what is raised.
    """
    run = opened(path, weights, metadata, ("test", "validation"), **overrides)
    if policy_file is not None:
        apply_policy(run.model, policy_file)
    return Evaluation(
        run.part, metadata["seed"], run.model, run.images,
        evaluation_loader(run.config, run.images, run.device),
        run.data["class_names"], run.data["class_counts"],
        count_flops(run.model, blank_image(run.config, run.device)),
        partial(autocast, run.config, run.device), policy_file, metadata.get("checkpoint", ""),
    )  # fmt: skip


def calibrate_run(
    path: Path,
    weights: dict[str, Tensor],
    metadata: dict[str, Any],
    *,
    batch: int = 1,
    options: Mapping[str, Any],
    **overrides: Any,
) -> tuple[policy.Measured, policy.Policy]:
    """What the thresholds in the weights of a run give on its validation part, and a policy chosen
    there.

    Args:
        batch, options: of `policy.calibrate`.
        overrides: as for `opened`.

    Raises:
        DataError: more than half of the images cannot be read.
        others: see `opened` and `policy.calibrate`.
    """
    checks.integer("batch", batch, 1)
    run = opened(path, weights, metadata, ("validation",), **overrides)
    model, groups = run.model, class_groups(run.data["class_counts"])
    digest = contents.fingerprint(run.data["data"]["validation"])
    loader = evaluation_loader(run.config, run.images, run.device)
    with autocast(run.config, run.device):
        seen = policy.observe(model, loader, batch)
        check_read(loader, len(seen.table.target))
        chosen = policy.calibrate(
            model, seen, batch=batch, groups=groups, data_digest=digest, **options
        )
    before = policy.measured(seen.table, model.thresholds.cpu(), seen.flops, groups=groups)
    return before, chosen
