"""Builds the network that a description describes, without data and without downloads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import criteria
from ..backbones import create
from ..base import ELFBase
from ..classifiers import CosineClassifier, use_cosine_
from ..criteria import Score
from ..losses import BalancedSoftmaxLoss, LongTailLoss
from ..memory import is_out_of_memory
from ..models import from_backbone
from ..modules import ELF
from . import demo_network
from .config import TrainConfig
from .description import BACKBONE, DEMO, OWN, RUN
from .files import CheckpointError
from .networks import network
from .plain import CALLABLE, from_run

#: Options of timm's and torchvision's networks that load weights from elsewhere and change nothing
#: else. The file has the weights, and a file must not make this process read others.
_WEIGHTS = (
    "pretrained",
    "checkpoint_path",
    "weights",
    "weights_backbone",
    "pretrained_cfg_overlay",
)
#: Parts of an ELF that may be the user's own code; files need not have their tensors.
OWN_PARTS = ("exit_loss.", "criterion.")
_DTYPES = ("float16", "bfloat16", "float32", "float64")


def settings(metadata: Mapping[str, Any], **overrides: Any) -> TrainConfig:
    """The settings of a run that its metadata hold, fit to build its network on any machine.

    Raises:
        TypeError, ValueError: they do not fit this version, or the run used a function as criterion
            and overrides name none.
    """
    given = {"data_dir": ".", **metadata["config"], "torchcompile": None, "device": None}
    config = from_run(given, **overrides)
    options = without_weights(config.model_kwargs)
    return replace(config, model_kwargs=options, freeze_backbone=None)


def without_weights(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a network without those that load weights."""
    return {name: value for name, value in options.items() if name not in _WEIGHTS}


def build(path: object, metadata: Mapping[str, Any], criterion: str | Score | None = None) -> ELF:
    """The network of checked metadata, on the CPU, with arbitrary weights. Torch's random
    generators stay as they are.

    Args:
        path: for messages.
        criterion: takes the place of the one described.

    Raises:
        CheckpointError: this version, or the libraries that are installed, cannot build it.
    """
    kind = metadata.get("network")
    builder = _BUILDERS.get(kind) if isinstance(kind, str) else None
    if builder is None:
        raise CheckpointError(
            f"{path}: expected weights of elf-fast train, of the demo or of elf_fast.save, got "
            f"network {kind!r}"
        )
    try:
        with torch.random.fork_rng(devices=[]):
            return builder(metadata, _criterion(metadata, criterion))
    except ModuleNotFoundError:
        raise
    except Exception as error:  # networks raise anything for options that they do not take
        if is_out_of_memory(error):
            raise
        text = str(error) if isinstance(error, ValueError | TypeError) else repr(error)
        raise CheckpointError(f"{path}: its network cannot be built here: {text}") from error


def _criterion(metadata: Mapping[str, Any], given: str | Score | None) -> str | Score | None:
    """The criterion of the network; None: that of a run's settings."""
    named = metadata.get("criterion")
    if given is None and isinstance(named, str) and named.startswith(CALLABLE):
        raise ValueError(
            f"criterion: the network used {named!r}, a function that files cannot hold; in Python "
            "pass it as criterion="
        )
    found = named if given is None else given
    if found is not None:
        criteria.find(found)
    return found


def _run(metadata: Mapping[str, Any], criterion: str | Score | None) -> ELF:
    if not isinstance(metadata.get("config"), dict):
        raise ValueError(f"config: expected the settings of a run, got {metadata.get('config')!r}")
    overrides = {} if criterion is None else _neutral(criterion)
    config = settings(metadata, **overrides)
    return network(config, metadata["class_counts"], check_training=False)


def _neutral(criterion: str | Score) -> dict[str, Any]:
    """Settings for a criterion that may be another than the one the thresholds are for. The
    weights hold the thresholds."""
    off = (criteria.find(criterion).off,)
    return {"criterion": criterion, "thresholds": off, "train_thresholds": off}


def _demo(metadata: Mapping[str, Any], criterion: str | Score | None) -> ELF:
    counts = metadata["class_counts"]
    off = criteria.find(criterion or "confidence").off
    return demo_network.with_exits(
        len(counts),
        exit_loss=BalancedSoftmaxLoss(counts),
        criterion=criterion or "confidence",
        thresholds=off,
        train_thresholds=off,
    )


def _from_backbone(metadata: Mapping[str, Any], criterion: str | Score | None) -> ELF:
    build, backbone = metadata["build"], metadata["backbone"]
    made = create(backbone["name"], build["num_classes"], **without_weights(backbone["options"]))
    return assembled(made, metadata, criterion)


def assembled(
    backbone: nn.Module, metadata: Mapping[str, Any], criterion: str | Score | None
) -> ELF:
    """The network of a backbone and the entries "build", "cosine", "dtype", "loss" and "options" of
    a description."""
    build, options = metadata["build"], metadata["options"]
    found = criterion or "confidence"
    off = criteria.find(found).off
    cosine = metadata["cosine"]
    if cosine:
        use_cosine_(backbone)
    model = from_backbone(
        backbone,
        build["exits"],
        build["num_classes"],
        example_input=torch.zeros(2, *build["input_shape"]),
        conv=build["conv"],
        layout=build["layout"],
        check_training=False,  # it was compared when it was made
        criterion=found,
        thresholds=off,
        train_thresholds=off if options["has_train_thresholds"] else None,
        exit_weights=options["exit_weights"],
        drop_exited=options["drop_exited"],
    )
    if cosine:
        for head in model.heads[:-1]:
            use_cosine_(head)
    if metadata["dtype"] not in _DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {metadata['dtype']!r}")
    model.to(getattr(torch, metadata["dtype"]))
    if metadata["loss"] is not None:
        model.exit_loss = loss(metadata["loss"])
    return model


def loss(described: Mapping[str, Any]) -> LongTailLoss:
    """What `describe_loss` described."""
    given: dict[str, Any] = {
        name: torch.tensor(value) if isinstance(value, list) else value
        for name, value in described.items()
    }
    return LongTailLoss(**given)


def describe_loss(exit_loss: Any) -> dict[str, Any] | None:
    """A loss of `elf_fast.losses` in plain values. None for another."""
    family = exit_loss.as_family() if isinstance(exit_loss, LongTailLoss) else None
    if family is None:
        return None
    return {
        name: value.tolist() if isinstance(value, Tensor) else value
        for name, value in family.items()
    }


def describe_options(model: ELFBase) -> dict[str, Any]:
    """The entries of a description that `assembled` reads, beside "build"."""
    floats = [p for p in model.stages.parameters() if p.is_floating_point()]
    return {
        "cosine": any(isinstance(module, CosineClassifier) for module in model.modules()),
        "dtype": str(floats[0].dtype).removeprefix("torch.") if floats else "float32",
        "loss": describe_loss(model.exit_loss),
        "options": {
            "exit_weights": list(model.exit_weights),
            "drop_exited": model.drop_exited,
            "has_train_thresholds": model.train_thresholds is not None,
        },
    }


def set_criterion(model: ELF, criterion: str | Score | None) -> None:
    """Sets the criterion before the thresholds for it are loaded: those of another may not be in
    its range. None changes nothing."""
    if criterion is None:
        return
    off = criteria.find(model.criterion).off
    model.thresholds = off
    if model.train_thresholds is not None:
        model.train_thresholds = off
    model.criterion = criterion


def _own(metadata: Mapping[str, Any], criterion: str | Score | None) -> ELF:
    raise ValueError(
        "it was saved from a network of one's own code; build that and pass it: "
        "elf_fast.load(path, model=model)"
    )


_BUILDERS: dict[str, Callable[[Mapping[str, Any], str | Score | None], ELF]] = {
    RUN: _run,
    DEMO: _demo,
    BACKBONE: _from_backbone,
    OWN: _own,
}
