"""`elf_fast.save`: a trained network as files that `elf_fast.load` and the Hub read."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import backbones, checks, criteria, digests
from ..base import ELFBase, apart_from, writable
from ..data import Preprocessing
from ..exit_settings import classes_of
from ..modes import mode
from ..policy import Policy
from ..policy import artefact as policies
from . import building, card, checkpoints, files
from .description import BACKBONE, OWN, Facts, entries, write_weights
from .files import CheckpointError
from .lock import Lock
from .plain import CALLABLE

#: Settings of a run that name places on the machine that trained.
_PLACES = ("data_dir", "lists", "output")
#: The largest difference of logits from those of the rebuilt network, as a share of the largest
#: logit, by dtype: only rounding, on another device at most.
_TOLERANCE = {torch.float16: 0.05, torch.bfloat16: 0.1}


def save(
    model: ELFBase,
    folder: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    class_counts: Sequence[int] | Tensor | None = None,
    transform: Any = None,
    results: Mapping[str, Any] | None = None,
    policy: Policy | None = None,
    backbone: str | None = "auto",
    backbone_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Writes `config.json`, `model.safetensors`, a model card `README.md` and, with a policy,
    `policy.json` into a folder: the layout of the Hugging Face Hub. `elf_fast.load` opens it.

    Each file is written completely or not at all, weights and description that were there are kept
    as `*.previous.*`, and a README.md that is not, or no longer, the card of an earlier call stays
    as it is.

    Args:
        folder: made if it does not exist.
        class_names: C texts, in the order of the logits; those of a loaded model if None.
        class_counts: [C] training images of each class. None: those of a loaded model, or unknown.
        transform: how an image becomes the network's input: a `data.Preprocessing`, torchvision's
            `weights.transforms()`, or the dict of `timm.data.resolve_model_data_config(model)`.
            None: that of a loaded model, or unknown; then `elf-fast predict` cannot read images.
        results: metrics for the card: what `metrics.ELFMetrics` computes, or the contents of a
            run's metrics.json.
        policy: thresholds to use in place of the model's own. None: that of a loaded model, as long
            as its thresholds and weights have not changed.
        backbone: the name of the network that `from_backbone` got: "timm/NAME", "torchvision/NAME"
            or "cifar_resnet32". "auto" finds the name; if it cannot, the network counts as one of
            your own code, and a warning says so. None: of your own code, which `load` then needs as
            `model=`.
        backbone_kwargs: options that the named network was made with, such as drop_path_rate.

    Raises:
        FileExistsError: a run writes into the folder.
        TypeError, ValueError: an argument is invalid, or the network of that name is not the
            model's: tensors have other names or shapes, or logits differ.

    Example:
        >>> elf_fast.save(model, "photos", class_names=["cat", "dog"], transform=preset)
    """
    if not isinstance(model, ELFBase):
        raise TypeError(f"model: expected an elf_fast.ELF, got {checks.describe(model)}")
    if not isinstance(folder, str | os.PathLike) or "\0" in str(folder):
        raise TypeError(f"folder: expected a folder, got {checks.describe(folder)}")
    place = Path(folder)
    if place.exists() and not place.is_dir():
        raise ValueError(f"folder: expected a folder, got the file {place}")
    facts = _facts(model, class_names, class_counts, transform)
    state = {
        name: value
        for name, value in model.state_dict().items()
        if not name.startswith(building.OWN_PARTS)
    }
    chosen = _policy(model, policy, state)
    card.main_results(results)  # checked before anything is written
    network = _network(model, state, facts, backbone, dict(backbone_kwargs or {}))
    metadata = {**network, **entries(facts), "criterion": _criterion(model)}
    flops = card.flops_of(model, metadata, facts)
    text = card.text(place.resolve().name, model, metadata, facts, results, chosen, flops)
    old_policy = place / policies.FILE
    with Lock(place):
        if old_policy.exists():  # first, because it may not be for these weights and thresholds
            old_policy.replace(files.previous(old_policy))
        write_weights(place, state, metadata, checkpoints.WEIGHTS)
        if chosen is not None:
            chosen.save(place / policies.FILE)
        card.write(place, text)


def _facts(model: ELFBase, class_names: Any, class_counts: Any, transform: Any) -> Facts:
    C = classes_of(model.heads) or None
    names = model.class_names if class_names is None else class_names
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(
        isinstance(name, str) for name in names
    ):  # fmt: skip
        raise TypeError(f"class_names: expected a list of texts, got {checks.describe(names)}")
    if not names or (C is not None and len(names) != C):
        raise ValueError(
            f"class_names: expected {C or 'at least one'}, one per class, got {len(names)}"
        )
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"class_names: expected every name once, got {twice!r} again")
    counts: Sequence[float] = model.class_counts
    if class_counts is not None:
        counts = checks.class_counts(class_counts, 0).tolist()
    if counts and len(counts) != len(names):
        raise ValueError(f"class_counts: expected {len(names)}, one per class, got {len(counts)}")
    found = model.transform if transform is None else Preprocessing.of(transform)
    return Facts(tuple(names), tuple(int(n) for n in counts), found)


def _policy(model: ELFBase, policy: Any, state: Mapping[str, Tensor]) -> Policy | None:
    if policy is None:
        return model.policy if _is_in_force(model, state) else None
    if not isinstance(policy, Policy):
        raise TypeError(f"policy: expected a Policy, got {checks.describe(policy)}")
    own = digests.of_weights(state)
    if policy.weights_digest not in (None, own) or policy.exits != len(model.stages):
        raise ValueError(
            f"policy: expected one for these weights ({own[:12]}) and {len(model.stages)} exits, "
            f"got one for {(policy.weights_digest or 'any')[:12]} and {policy.exits}"
        )
    if not isinstance(policy.criterion, str):
        raise ValueError("policy: expected a criterion by name, got a function: no file holds one")
    return policy


def _is_in_force(model: ELFBase, state: Mapping[str, Tensor]) -> bool:
    """Whether a loaded model still has the weights and thresholds of its policy."""
    policy = model.policy
    if policy is None or policy.criterion != model.criterion:
        return False
    if not isinstance(policy.criterion, str):  # no file holds a function
        return False
    wanted = (torch.tensor(policy.thresholds), torch.tensor(policy.temperatures))
    held = (model.thresholds.cpu(), model.temperatures.cpu())
    same = all(torch.equal(a, b) for a, b in zip(wanted, held, strict=True))
    return same and policy.weights_digest in (None, digests.of_weights(state))


def _criterion(model: ELFBase) -> str:
    criterion = model.criterion
    return criterion if isinstance(criterion, str) else CALLABLE + criteria.find(criterion).name


def _network(
    model: ELFBase,
    state: dict[str, Tensor],
    facts: Facts,
    backbone: str | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """The entries that say how the network is built, after it was rebuilt from them."""
    if backbone is not None and not isinstance(backbone, str):
        raise TypeError(f"backbone: expected a name or None, got {checks.describe(backbone)}")
    own = {"network": OWN, "exits": len(model.stages)}
    if backbone is None:
        return own
    described = _described(model, state, backbone, options)
    if described is None:
        reason = "its backbone is none of timm's or torchvision's by name"
    else:
        reason = _difference(model, state, described, facts)
        if not reason:
            return described
    if backbone != "auto":
        raise ValueError(
            f"backbone: expected the name of the model's network, got {backbone!r}: {reason}; "
            "name the network with its backbone_kwargs, or pass backbone=None"
        )
    warnings.warn(
        f"save: {reason}, so the network counts as one of your own code: open it by "
        "elf_fast.load(folder, model=your_model), or name it here by backbone=",
        stacklevel=3,
    )
    return own


def _described(
    model: ELFBase, state: Mapping[str, Tensor], backbone: str, options: dict[str, Any]
) -> dict[str, Any] | None:
    origin = model.origin
    if origin is None or origin.get("network") == OWN:
        if backbone == "auto":
            return None
        raise ValueError(
            f"backbone: expected None for an ELF that from_backbone did not make, got {backbone!r}"
        )
    if "build" not in origin and backbone != "auto":
        raise ValueError(f"backbone: expected 'auto' for a run's network, got {backbone!r}")
    if "class" not in origin and backbone == "auto":  # a loaded network
        found = {name: value for name, value in origin.items() if name not in _CHANGING}
        if isinstance(origin.get("config"), dict):
            config = {k: v for k, v in origin["config"].items() if k not in _PLACES}
            kwargs = building.without_weights(config.get("model_kwargs") or {})
            found["config"] = {**config, "model_kwargs": kwargs}
        return {**found, **(building.describe_options(model) if "build" in origin else {})}
    name: str | None = backbone
    if backbone == "auto":
        tensors = {
            key.split(".", 2)[2]: value.shape
            for key, value in state.items()
            if key.startswith("stages.")
        }
        C = origin["build"]["num_classes"]
        name = backbones.find(origin["class"], origin["architecture"], C, tensors)
        if name is None:
            return None
    return {
        "network": BACKBONE,
        "backbone": {"name": name, "options": building.without_weights(options)},
        "build": origin["build"],
        **building.describe_options(model),
    }


#: Entries of a loaded network that `save` writes anew.
_CHANGING = ("format", "class_names", "class_counts", "criterion", "versions")


def _difference(
    model: ELFBase, state: Mapping[str, Tensor], described: Mapping[str, Any], facts: Facts
) -> str:
    """How the model differs from the network that its description builds; nothing if it does not.
    Both are run on a random input."""
    counts = {"class_names": list(facts.class_names), "class_counts": list(facts.class_counts)}
    try:
        twin = building.build("", {**described, **counts}, model.criterion)
    except (CheckpointError, ModuleNotFoundError) as error:
        return str(error).removeprefix(": ")
    theirs = {n: v for n, v in twin.state_dict().items() if not n.startswith(building.OWN_PARTS)}
    for name in [*state, *theirs]:
        mine, other = state.get(name), theirs.get(name)
        if name.startswith(("stages.", "heads.")) and (
            mine is None or other is None or mine.shape != other.shape or mine.dtype != other.dtype
        ):
            return f"{name} is {_shown(mine)} in the model and {_shown(other)} in that network"
    twin.load_state_dict({**twin.state_dict(), **state})
    build = described.get("build") or {}
    shape = build.get("input_shape") or (facts.transform and facts.transform.shape)
    if not shape:
        return "its input is not known without transform="
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for e, (mine, other) in enumerate(
        zip(_logits(model, images), _logits(twin, images), strict=True)
    ):
        largest = float(mine.abs().max())
        if not float((mine - other).abs().max()) <= _TOLERANCE.get(dtype, 0.01) * largest:
            return f"logits at exit {e} differ from those of that network"
    return ""


def _shown(value: Tensor | None) -> str:
    return "missing" if value is None else f"{str(value.dtype)[6:]} {list(value.shape)}"


@torch.no_grad()
def _logits(model: ELFBase, images: Tensor) -> list[Tensor]:
    """The logits [n, C] at every exit, float32 on the CPU."""
    found = []
    with mode(model, training=False):
        x = images = images.to(model.thresholds.device)
        for e, (stage, head) in enumerate(zip(model.stages, model.heads, strict=True)):
            x = stage(writable(x)) if e else apart_from(images, stage(x))
            found.append(head(x).float().cpu())
    return found
