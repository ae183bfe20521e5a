"""Candidates for inference on the engines of `inference.compile`, with and without exits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import inference
from ..modules import ELF
from .inference import check_agreement
from .workload import InferenceWork

__all__ = ["Engines", "candidates", "engines_of", "without_exits"]


class Engines(NamedTuple):
    """A model on engines, by their names."""

    model: ELF
    with_exits: dict[str, inference.Engine]
    without: dict[str, inference.Engine]


def engines_of(model: ELF, example_input: Tensor, names: Sequence[str], N: int) -> Engines:
    """The engines for batches of up to N. The first time inductor compiles for minutes."""
    alone = without_exits(model)

    def compiled(network: ELF) -> dict[str, inference.Engine]:
        return {
            name: inference.compile(network, example_input, engine=name, max_batch=N)
            for name in names
        }

    return Engines(model, compiled(model), compiled(alone))


def without_exits(model: ELF) -> ELF:
    """The network without its early exits: one stage, which shares the model's modules."""
    whole = nn.Sequential(*model.stages, model.heads[-1])
    return ELF([whole], [nn.Identity()]).train(model.training)


def candidates(engines: Engines, work: InferenceWork) -> dict[str, Callable[[], Any]]:
    """Functions that run the images of `work` once: NAME and "NAME, no exits". The model takes the
    thresholds and temperatures of `work`.

    Raises:
        RuntimeError: an engine and the model disagree.
    """
    model = engines.model
    model.thresholds, model.temperatures = work.model.thresholds, work.model.temperatures
    with torch.inference_mode():
        expected = model(work.images)
    found: dict[str, Callable[[], Any]] = {}
    for name, engine in engines.with_exits.items():
        check_agreement(engine(work.images), expected, model.thresholds)
        found[name] = _run(engine, work.images)
        found[f"{name}, no exits"] = _run(engines.without[name], work.images)
    return found


def _run(engine: inference.Engine, images: Tensor) -> Callable[[], Any]:
    return lambda: engine(images)
