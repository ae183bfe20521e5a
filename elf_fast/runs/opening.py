"""Opens the folder of a run, one of its checkpoints, or a file of weights."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import checks
from ..flops import count_flops
from ..memory import is_out_of_memory
from ..modules import ELF
from . import checkpoints, contents, files
from .building import without_weights
from .datasets import blank_image, load_splits
from .evaluation import evaluate, evaluation_loader
from .files import CheckpointError
from .networks import network
from .plain import from_run

CHECKPOINTS = "checkpoints"


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights, metadata) of a folder or a file. metadata["network"] says how the network is built:
    see `description`.

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
    return found.weights if found.average is None else found.average, found.metadata


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


def evaluate_run(
    path: Path, weights: dict[str, Tensor], metadata: dict[str, Any], **overrides: Any
) -> tuple[str, dict[str, Any]]:
    """("test" or "validation", metrics) of the weights and metadata that `read` returned for the
    path of a run. The part is validation only if the data set has no test part.

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
        config = from_run(metadata["config"], **overrides)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    splits = load_splits(config)
    part = "validation" if splits.test is None else "test"
    images = getattr(splits, part)
    if images is None:
        raise CheckpointError(f"{path}: expected a test or validation part in its data, got none")
    named = not {"data_dir", "lists"}.isdisjoint(overrides)
    now = contents.describe(splits)
    for text in contents.check_evaluated(path, metadata, now, config, part, on_purpose=named):
        print(text, file=sys.stderr)
    try:
        device = checks.device(config.device)
    except ValueError:  # this machine lacks the device of the training
        device = checks.device(None)
    # The run's weights replace pretrained ones, which might have to be downloaded.
    options = without_weights(config.model_kwargs)
    model = network(replace(config, model_kwargs=options), splits.class_counts)
    load_weights(model, weights, path)
    model.to(device)
    flops = count_flops(model, blank_image(config, device))
    loader = evaluation_loader(config, images, device)
    return part, evaluate(config, model, loader, splits.class_counts, flops)
