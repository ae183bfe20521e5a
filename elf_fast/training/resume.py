"""Writes checkpoints of a run and resumes from them.

Weights, optimiser, progress and random generators come from the checkpoint. Thresholds,
temperatures, the loss and the optimiser's constants follow from the settings, which may have
changed since.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..console import say
from ..memory import is_out_of_memory
from ..modules import ELF
from ..runs import checkpoints, files
from ..runs.checkpoints import Checkpoint
from ..runs.config import TrainConfig
from ..runs.files import CheckpointError
from .learner import Learner
from .processes import Processes
from .progress import Progress, Totals

#: The entry of a checkpoint's state with the `Progress`, since format 1.
_PROGRESS = "position"


def save(
    folder: Path,
    learner: Learner,
    progress: Progress,
    processes: Processes,
    *,
    global_batch: int,
    metadata: dict[str, Any],
) -> None:
    """Writes a checkpoint of the current state. Every process calls this; the first one writes.

    Args:
        global_batch: samples per batch over all processes.
    """
    totals = progress.totals.over(processes)
    random = processes.gather(random_state(learner.device))
    if not processes.is_first:
        return
    state = {
        _PROGRESS: {**asdict(progress), "totals": asdict(totals)},
        "global_batch": global_batch,
        "optimizer": learner.optimizer.state_dict(),
        "scaler": learner.scaler.state_dict(),
        "random": random,
    }
    checkpoints.save(
        folder,
        progress.step,
        learner.model.state_dict(),
        None if learner.average is None else learner.average.model.state_dict(),
        state,
        metadata,
    )


def newest(folder: Path, processes: Processes, console: Console) -> Checkpoint | None:
    """The newest good checkpoint, which all processes must see; None if none was written yet. The
    console names damaged ones, and the first process renames them.

    Raises:
        CheckpointError: all are damaged, or processes see different ones.
    """
    found, refused = checkpoints.newest(folder)
    # Also a barrier: the first process renames files once all have read them.
    names = processes.gather("none" if found is None else found.path.name)
    if len(set(names)) > 1:
        raise CheckpointError(
            f"{folder}: expected all processes to read the same checkpoint, got "
            f"{', '.join(names)}; the folder must be one that all of them see"
        )
    if refused and found is None:
        raise CheckpointError(
            f"{folder}: expected a good checkpoint, got none: {'; '.join(map(str, refused))}"
        )
    if processes.is_first:
        checkpoints.set_aside(folder, found)
    for error in refused:
        say(console, f"refused: {' '.join(str(error).split())}")
    return found


def restore(
    saved: Checkpoint,
    config: TrainConfig,
    learner: Learner,
    processes: Processes,
    *,
    global_batch: int,
) -> Progress:
    """Loads a checkpoint into the learner, and returns how far the run was.

    Raises:
        CheckpointError: it does not fit the settings.
    """
    state = saved.state
    progress = _progress(saved)
    _check_settings(saved, config, global_batch)
    try:
        _load_learnt(learner.model, saved.weights)
        if learner.average is not None and saved.average is not None:
            _load_learnt(learner.average.model, saved.average)
        _load_optimizer(learner.optimizer, state["optimizer"])
        if state["scaler"]:  # empty, of a run that scaled no loss
            learner.scaler.load_state_dict(state["scaler"])
        if len(state["random"]) == processes.world_size:
            set_random_state(state["random"][processes.rank], learner.device)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{saved.path}: does not fit the network and optimiser of these settings "
            f"({files.misfit(error)})"
        ) from error
    # The saved sums are over all processes, so only the first process takes them.
    if not processes.is_first:
        progress.totals = Totals([0] * len(progress.totals.exits))
    return progress


def _progress(saved: Checkpoint) -> Progress:
    """How far the run was, from a state whose entries have the kinds that `save` writes.

    Raises:
        CheckpointError: an entry is missing or of another kind.
    """
    kinds = (
        (_PROGRESS, dict), ("global_batch", int), ("optimizer", dict), ("scaler", dict),
        ("random", list),
    )  # fmt: skip
    try:
        for name, kind in kinds:
            if not isinstance(saved.state[name], kind):
                raise TypeError(f"{name} is a {type(saved.state[name]).__name__}")
        saved.metadata["config"]["opt"]
        progress = Progress(**saved.state[_PROGRESS])
        progress.totals = Totals(**saved.state[_PROGRESS]["totals"])
        for n in (progress.epoch, progress.samples, progress.step):
            if not isinstance(n, int) or n < 0:
                raise TypeError(f"{_PROGRESS} holds {n!r} in place of a count")
    except (LookupError, TypeError) as error:
        raise CheckpointError(
            f"{saved.path}: expected the state that a run saves, got another ({error!r})"
        ) from error
    return progress


def _check_settings(saved: Checkpoint, config: TrainConfig, global_batch: int) -> None:
    """Raises CheckpointError, naming the setting, if a run cannot resume with these settings."""
    state, progress = saved.state, saved.state[_PROGRESS]
    if progress["samples"] % global_batch:
        raise CheckpointError(
            f"{saved.path}: {progress['samples']} samples into an epoch, expected a "
            f"multiple of batch_size x processes = {global_batch}; resume with "
            f"{state['global_batch']}, or another divisor"
        )
    if progress["epoch"] > config.epochs:
        raise CheckpointError(
            f"{saved.path}: expected epochs of at least {progress['epoch']}, which "
            f"are done, got {config.epochs}"
        )
    recorded = saved.metadata["config"]
    for name, was, now in (
        ("model_ema", saved.average is not None, config.model_ema),
        ("opt", recorded["opt"], config.opt),
        ("pretrained", recorded.get("pretrained", False), config.pretrained),
        ("freeze_backbone", recorded.get("freeze_backbone"), config.freeze_backbone),
        ("layer_decay", recorded.get("layer_decay", 1.0), config.layer_decay),
    ):
        if was != now:
            raise CheckpointError(
                f"{saved.path}: expected {name} {was} as in the checkpoint, got {now}"
            )


def _load_learnt(model: ELF, saved: dict[str, Tensor]) -> None:
    """Loads stages and heads only. Everything else follows from the settings."""

    def learnt(name: str) -> bool:
        return name.startswith(("stages.", "heads."))

    settled = {name: value for name, value in model.state_dict().items() if not learnt(name)}
    loaded = {**settled, **{k: v for k, v in saved.items() if learnt(k)}}
    files.check_dtypes(model.state_dict(), loaded)
    model.load_state_dict(loaded)


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Loads the optimiser's state. Momentum, weight decay and factors on the learning rate stay as
    the settings say; the learning rate follows its schedule."""
    settled: list[dict[str, Any]] = [
        {key: group[key] for key in ("momentum", "weight_decay", "lr_scale") if key in group}
        for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(saved)
    for group, values in zip(optimizer.param_groups, settled, strict=True):
        group.update(values)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of the random generators that training uses in this process."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
