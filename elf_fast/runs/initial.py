"""The weights that a run starts from: published ones, or those in a file or of another run."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backbones import create_pretrained
from ..memory import is_out_of_memory
from ..modules import ELF
from . import files, opening
from .config import TrainConfig
from .datasets import pretrained_statistics
from .networks import backbone_name

#: Names under which training scripts save a state dict beside other things, the first one found
#: counts. Averaged weights come first, as in timm.
_WRAPPERS = (
    "state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model",
)  # fmt: skip
#: What DistributedDataParallel and torch.compile put before every name.
_PREFIXES = ("module.", "_orig_mod.")
#: Parts of the names of parameters that belong to one image size.
_POSITIONS = ("pos_embed", "position_embed", "pos_emb", "relative_position_bias_table")
_IN_HEAD = re.compile(r"heads\.\d+\.")  # of an ELF
_SHOWN = 5  # names that a message lists


class Loaded(NamedTuple):
    """What became of the weights, by the backbone's names and those of heads."""

    source: str
    matched: list[str]
    other_shape: list[str]  # with both shapes; left at their initial values
    missing: list[str]  # not in the source; left at their initial values
    unexpected: list[str]  # not in the network

    def __str__(self) -> str:
        total = len(self.matched) + len(self.other_shape) + len(self.missing)
        parts = [f"weights from {self.source}: {len(self.matched)} of {total} tensors"]
        for what, names in (
            ("of another shape, left at initial values", self.other_shape),
            ("missing, left at initial values", self.missing),
            ("not in the network", self.unexpected),
        ):
            if names:
                parts.append(f"{what} ({len(names)}): {_first(names)}")
        return "; ".join(parts)


def load_(model: ELF, config: TrainConfig) -> Loaded | None:
    """Loads the weights that the settings name into the untrained network. None if they name none.

    The classifier and everything else whose shape differs keeps its initial values. Heads are
    loaded only from a network that is cut at the same places.

    Raises:
        ValueError, CheckpointError: the weights cannot be loaded or read, are NaN or infinite, are
            of a network for another image size, or fewer than half of the backbone's parameters are
            among them.
    """
    if config.pretrained:
        name, source = "pretrained", config.model
        weights = _published(config)
    elif config.init_from is not None:
        name = "init_from"
        weights, source = read(config.init_from)
    else:
        return None
    found = _load(model, weights, source)
    positions = [text for text in found.other_shape if any(p in text for p in _POSITIONS)]
    if positions:
        raise ValueError(
            f"{name}: expected position embeddings for images of this size, got {positions[0]}; "
            "train at the size of the weights, or give the network its size in --model-kwargs"
        )
    parameters = {n for key, _ in model.named_parameters() if (n := backbone_name(key))}
    matched = parameters.intersection(found.matched)
    if 2 * len(matched) < len(parameters):
        raise ValueError(
            f"{name}: expected at least half of the {len(parameters)} parameters of {config.model} "
            f"in {source}, got {len(matched)}; it has {_first(list(weights)) or 'none'}, the "
            f"network {_first(sorted(parameters - matched))}"
        )
    return found


def _published(config: TrainConfig) -> dict[str, Tensor]:
    pretrained_statistics(config)  # fails if there are no such weights
    hub = logging.getLogger("huggingface_hub")  # it tells of every try of a download
    level = hub.level
    try:
        hub.setLevel(logging.ERROR)
        with torch.random.fork_rng(devices=[]):  # the library draws the weights first
            return create_pretrained(config.model, **config.model_kwargs).state_dict()
    except Exception as error:  # downloads and networks may raise anything
        if is_out_of_memory(error) or isinstance(error, ModuleNotFoundError):
            raise
        raise ValueError(
            f"pretrained: expected weights of {config.model} that are in the library's cache or "
            f"can be downloaded, got {type(error).__name__}: {error}"
        ) from error
    finally:
        hub.setLevel(level)


def read(path: str) -> tuple[dict[str, Tensor], str]:
    """(tensors, where they are from) of a file or of the folder of a run.

    Raises:
        CheckpointError: it cannot be read without running code from it, or holds no tensors.
    """
    place = Path(path)
    if place.is_dir():
        return opening.read(place)[0], path
    if not place.is_file():
        raise files.CheckpointError(
            f"init_from: expected a file or the folder of a run, got {path}, which is neither"
        )
    content = _safetensors(place) if place.suffix == ".safetensors" else _pickled(place)
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            content, path = content[wrapper], f"{path} ({wrapper})"
            break
    weights = {
        _plain_name(name): value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not weights:
        raise files.CheckpointError(f"init_from: expected tensors by name in {path}, got none")
    return weights, path


def _safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise files.CheckpointError(
            f"init_from: expected a complete safetensors file, got {path}: {error}"
        ) from error


def _pickled(path: Path) -> Mapping[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises anything for contents that are not its own
        if is_out_of_memory(error):
            raise
        why = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        if isinstance(error, pickle.UnpicklingError):
            why = "it holds more than tensors, which is not read because it could run code"
        raise files.CheckpointError(
            f"init_from: expected a file of tensors, as torch.save writes a state_dict, got "
            f"{path}: {why}"
        ) from error
    if not isinstance(content, Mapping):
        raise files.CheckpointError(
            f"init_from: expected a state_dict in {path}, got a {type(content).__name__}"
        )
    return content


def _plain_name(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name


def _load(model: ELF, weights: Mapping[str, Tensor], source: str) -> Loaded:
    own = _by_name(model.state_dict(), with_heads=True)
    is_elf = {"thresholds", "temperatures"} <= weights.keys()
    same_cut = is_elf and _cut(weights) == _cut(model.state_dict())
    theirs = (
        _by_name(weights, with_heads=same_cut)
        if is_elf
        else {name: [value] for name, value in weights.items()}
    )
    matched, other_shape, missing = [], [], []
    with torch.no_grad():
        for name, targets in own.items():
            if name not in theirs:
                if not _IN_HEAD.match(name) and targets[0].is_floating_point():
                    missing.append(name)
                continue
            value = theirs[name][0]
            if value.shape != targets[0].shape:
                shapes = f"{list(value.shape)} for {list(targets[0].shape)}"
                other_shape.append(f"{name} {shapes}")
                continue
            if value.is_complex() or not bool(value.isfinite().all()):
                raise files.CheckpointError(
                    f"{source}: expected finite weights, got NaN, infinity or complex numbers in "
                    f"{name}"
                )
            for target in targets:
                target.copy_(value)
            matched.append(name)
    return Loaded(source, matched, other_shape, missing, sorted(theirs.keys() - own.keys()))


def _by_name(state: Mapping[str, Tensor], *, with_heads: bool) -> dict[str, list[Tensor]]:
    """The tensors of an ELF by the backbone's names, and those of its heads. Two stages may share
    a module."""
    found: dict[str, list[Tensor]] = {}
    for key, value in state.items():
        name = backbone_name(key)
        if name is None and with_heads and _IN_HEAD.match(key):
            name = key
        if name is not None:
            found.setdefault(name, []).append(value)
    return found


def _cut(state: Mapping[str, Tensor]) -> set[str]:
    """The names of an ELF's tensors with their stages, which tell where it is cut."""
    return {key for key in state if key.startswith("stages.")}


def _first(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
