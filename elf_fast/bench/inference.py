"""Candidates for inference: the same stages and heads, run in different ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..base import ELFOutput
from ..modules import unfuse
from .workload import InferenceWork

#: Relative distance to a threshold within which two backends may decide differently.
TIE = 1e-6


def check_agreement(fast: ELFOutput, reference: ELFOutput, thresholds: Tensor) -> None:
    """Raises RuntimeError unless both outputs have the same exits and predictions. Samples whose
    confidence is within TIE of the threshold may differ in their exit."""
    moved = fast.exit_index != reference.exit_index
    earlier = torch.minimum(fast.exit_index, reference.exit_index)
    left = torch.where(
        fast.exit_index <= reference.exit_index, fast.confidence, reference.confidence
    )
    at = thresholds[earlier.clamp(max=max(len(thresholds) - 1, 0))] if len(thresholds) else left
    tie = moved & ((left - at).abs() <= TIE * at.abs())
    wrong = (moved | (fast.prediction != reference.prediction)) & ~tie
    if bool(wrong.any()):
        raise RuntimeError(
            f"elf_fast and its reference disagree on {int(wrong.sum())} of {len(wrong)} samples; "
            "no speed is reported for wrong results"
        )


def runs(work: InferenceWork) -> dict[str, Callable[[], Any]]:
    """Functions that run the images once; call them under `torch.inference_mode()`.

    `elf_fast`: the model; `reference`: the model in plain PyTorch; `full`: the network without
    exits; `oracle`: its stages on batches compacted beforehand, without heads and exit tests, a
    lower bound on the time of any early exit.
    """
    model, images = work.model, work.images
    plain = unfuse(model)
    full = nn.Sequential(*model.stages, model.heads[-1])

    def oracle() -> None:
        for stage, x in zip(model.stages, work.stage_inputs, strict=False):
            stage(x)

    return {
        "elf_fast": lambda: model(images),
        "reference": lambda: plain(images),
        "full": lambda: full(images),
        "oracle": oracle,
    }


def candidates(work: InferenceWork) -> dict[str, Callable[[], Any]]:
    """`runs(work)`, after a check that elf_fast and the reference agree.

    Raises:
        RuntimeError: they disagree (`check_agreement`).
    """
    found = runs(work)
    with torch.inference_mode():
        check_agreement(found["elf_fast"](), found["reference"](), work.model.thresholds)
    return found
