"""What a run takes back from a checkpoint, and what follows from its settings instead."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..modules import ELF
from .checkpoint import CheckpointError
from .config import TrainConfig
from .snapshot import Snapshot


def check_settings(saved: Snapshot, config: TrainConfig, global_batch: int) -> None:
    """Whether a run with these settings, of so many samples a batch over all ranks, can go on.

    Raises:
        CheckpointError: it cannot; the message names the setting.
    """
    state = saved.state
    if state["position"]["samples"] % global_batch:
        raise CheckpointError(
            f"{saved.path}: {state['position']['samples']} samples into an epoch, expected a "
            f"multiple of batch_size x processes = {global_batch}; resume with "
            f"{state['global_batch']}, or another divisor"
        )
    if state["position"]["epoch"] > config.epochs:
        raise CheckpointError(
            f"{saved.path}: expected epochs of at least {state['position']['epoch']}, which "
            f"are done, got {config.epochs}"
        )
    for name, was, now in (
        ("model_ema", saved.average is not None, config.model_ema),
        ("opt", saved.metadata["config"]["opt"], config.opt),
    ):
        if was != now:
            raise CheckpointError(
                f"{saved.path}: expected {name} {was} as in the checkpoint, got {now}"
            )


def load_learnt(model: ELF, saved: dict[str, Tensor]) -> None:
    """Loads stages and heads. Thresholds, temperatures and the loss follow from the settings, which
    may have changed since."""

    def learnt(name: str) -> bool:
        return name.startswith(("stages.", "heads."))

    settled = {name: value for name, value in model.state_dict().items() if not learnt(name)}
    model.load_state_dict({**settled, **{k: v for k, v in saved.items() if learnt(k)}})


def load_progress(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Loads what the optimiser has gathered; momentum and weight decay stay as the settings say,
    and the learning rate follows its schedule."""
    settled: list[dict[str, Any]] = [
        {key: group[key] for key in ("momentum", "weight_decay") if key in group}
        for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(saved)
    for group, values in zip(optimizer.param_groups, settled, strict=True):
        group.update(values)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Of the generators that training draws from on this rank."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
