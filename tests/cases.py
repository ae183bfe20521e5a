"""One table of operators, inputs and tolerances. It drives the tests over every backend. Adding an
operator adds its rows here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elf_fast import criteria

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

#: [N, C]: empty, single, odd, below and above every vector width, past the thread grain,
#: split over blocks, more rows than one block turns into survivors.
SHAPES = (
    (0, 10), (1, 1), (3, 1), (1, 2), (16, 10), (7, 17), (5, 31), (9, 64), (33, 257), (64, 100),
    (200, 1000), (2, 8142), (2500, 3),
)  # fmt: skip

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "strided rows": lambda x: torch.cat([x, x + 1], dim=1)[:, : x.shape[1]],
    "column major": lambda x: x.t().contiguous().t(),
    "every other column": lambda x: torch.stack([x, x - 1], dim=2).flatten(1)[:, ::2],
}


@dataclass(frozen=True)
class GateCase:
    shape: tuple[int, int]
    dtype: torch.dtype
    criterion: str
    threshold: str  # "scalar", "per class", "never" or "always"
    temperature: float
    with_target: bool
    layout: str

    def __str__(self) -> str:
        N, C = self.shape
        dtype = str(self.dtype).removeprefix("torch.")
        target = "-target" if self.with_target else ""
        return (
            f"{N}x{C}-{dtype}-{self.criterion}-{self.threshold}-T{self.temperature:g}{target}"
            f"-{self.layout}"
        ).replace(" ", "_")

    def make(self, device: str = "cpu") -> dict[str, Any]:
        """Arguments of exit_gate. Each row has its own sharpness, so that rows of every confidence
        occur."""
        generator = torch.Generator().manual_seed(hash(self.shape) % 2**31)
        N, C = self.shape
        sharpness = torch.linspace(0.1, 8.0, max(N, 1))[:N, None]
        logits = (torch.randn(N, C, generator=generator) * sharpness).to(self.dtype)
        if N > 2 and C > 1:
            logits[1, C - 1] = logits[1, 0] = logits[1].max() + 1  # a tie: the lowest class wins
        target = torch.randint(0, C, (N,), generator=generator)
        target[::2] = logits[::2].argmax(dim=1) if N else target[::2]
        criterion = criteria.by_name(self.criterion)
        threshold: float | Tensor = {
            "scalar": 0.6,
            "per class": torch.linspace(0.0, 1.0, C),
            "never": criterion.off,
            "always": criterion.everyone,
        }[self.threshold]
        if isinstance(threshold, Tensor):
            threshold = threshold.to(device)
        return {
            "logits": LAYOUTS[self.layout](logits).to(device),
            "threshold": threshold,
            "temperature": self.temperature,
            "criterion": self.criterion,
            "target": target.to(device) if self.with_target else None,
        }


def gate_cases() -> Iterator[GateCase]:
    """Every shape and dtype for every criterion; the other settings each vary once."""
    for shape, dtype, criterion in itertools.product(SHAPES, DTYPES, criteria.TABLE):
        yield GateCase(shape, dtype, criterion, "scalar", 1.0, False, "contiguous")
    for criterion in criteria.TABLE:
        for threshold in ("per class", "never", "always"):
            for with_target in (False, True):
                yield GateCase(
                    (33, 257), torch.float32, criterion, threshold, 1.7, with_target, "contiguous"
                )
        for layout in LAYOUTS:
            yield GateCase((64, 100), torch.bfloat16, criterion, "scalar", 0.5, True, layout)
            yield GateCase((64, 100), torch.float32, criterion, "scalar", 0.5, True, layout)


#: Members of the loss family: arguments of exit_loss for C classes.
LOSSES: dict[str, Callable[[int], dict[str, Any]]] = {
    "cross-entropy": lambda C: {},
    "smoothed": lambda C: {"label_smoothing": 0.1},
    "focal": lambda C: {"gamma": 2.0},
    "focal, gamma below 1": lambda C: {"gamma": 0.5, "label_smoothing": 0.05},
    "class-balanced": lambda C: {"weight": torch.linspace(0.2, 3.0, C)},
    "LDAM": lambda C: {"margins": torch.linspace(0.5, 0.1, C), "scale": 5.0},
    "balanced softmax": lambda C: {"bias": torch.linspace(6.0, 0.0, C)},
    "all of it": lambda C: {
        "weight": torch.linspace(0.2, 3.0, C),
        "gamma": 1.5,
        "scale": 2.0,
        "margins": torch.linspace(0.5, 0.1, C),
        "bias": torch.linspace(2.0, -1.0, C),
        "label_smoothing": 0.1,
    },
}
LOSS_SHAPES = ((1, 1), (3, 2), (16, 10), (7, 17), (9, 64), (64, 100), (200, 1000))

#: Features of the pool and of compact: shape, and whether to store them channels-last.
FEATURES = (
    ((6, 5), False), ((6, 9, 20), False), ((6, 8, 7, 7), False), ((6, 8, 7, 7), True),
    ((6, 130, 4, 4), True), ((6, 66, 3, 5), False), ((6, 3, 1, 1), False), ((40, 64, 14, 14), True),
    ((1, 17, 2, 2), True),
)  # fmt: skip


def features(shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
    return x.to(memory_format=torch.channels_last) if channels_last else x


def assert_as_accurate(
    out: Tensor, same_dtype: Tensor, truth: Tensor, epsilon: float, least: float = 0.0
) -> None:
    """`out` is no further from the float64 truth than PyTorch in the same dtype, plus epsilon times
    the truth's size (at least `least`). NaN must stand where it stands in the truth."""
    out, same_dtype, truth = out.double(), same_dtype.double(), truth.double()
    assert out.shape == truth.shape, (out.shape, truth.shape)
    assert torch.equal(out.isnan(), truth.isnan())
    finite = truth.isfinite()
    assert torch.equal(out[~finite & ~truth.isnan()], truth[~finite & ~truth.isnan()])
    if not bool(finite.any()):
        return
    error = (out - truth)[finite].abs().max().item()
    allowed = (same_dtype - truth)[finite].abs().max().item()
    allowed += epsilon * max(truth[finite].abs().max().item(), least)
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"
