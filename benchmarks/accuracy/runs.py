"""The table of all runs, the most informative first, and filters over it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import product

IMBALANCES = (100, 50, 10)
LOSSES = ("ce", "balanced_softmax", "ldam_drw", "logit_adjustment")
HEADS = ("conv", "pooled")
#: Convolutions in every head. The table of docs/accuracy.md has no "deep" heads.
CONVOLUTIONS = {"pooled": 0, "conv": 1, "deep": 2}
SEEDS = tuple(range(10))
#: Seeds that took no part in the choice of a variant.
NEW_SEEDS = tuple(range(10, 30))


@dataclass(frozen=True)
class Exits:
    """How a network with exits is trained."""

    drop_exited: bool
    threshold: float = 0.9  # inf: no sample leaves in training
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    opened: float = 0.0  # share of the epochs before any sample may leave
    rests_below: int = 0  # smallest batch on which BatchNorm trains
    softened: float = 1.0  # factor on the temperature of the exit test
    margins: bool = False  # whether the exit test in training subtracts the margins


#: None: without exits.
VARIANTS: dict[str, Exits | None] = {
    "plain": None,
    "keep": Exits(drop_exited=False),
    "drop": Exits(drop_exited=True),
    "stay": Exits(drop_exited=False, threshold=math.inf),
    "keep-0.99": Exits(drop_exited=False, threshold=0.99),
    "keep-light": Exits(drop_exited=False, weights=(1 / 3, 2 / 3, 1.0)),
    "keep-lighter": Exits(drop_exited=False, weights=(0.1, 0.3, 1.0)),
    "stay-light": Exits(drop_exited=False, threshold=math.inf, weights=(1 / 3, 2 / 3, 1.0)),
    "keep-late": Exits(drop_exited=False, opened=0.5),
    "late-light": Exits(drop_exited=False, opened=0.5, weights=(1 / 3, 2 / 3, 1.0)),
    "keep-soft": Exits(drop_exited=False, softened=3.0),
    "keep-margin": Exits(drop_exited=False, margins=True),
    "drop-late": Exits(drop_exited=True, opened=0.5),
    "drop-rest": Exits(drop_exited=True, rests_below=32),
}
TABLE = ("plain", "keep", "drop")
_WITHOUT_WEIGHTS = ("ce", "balanced_softmax")
#: Other variants with one convolution in every head: at which imbalances, with which losses.
TRIED = {
    "stay": {100: (*_WITHOUT_WEIGHTS, "ldam_drw")},
    "keep-0.99": {100: (*_WITHOUT_WEIGHTS, "ldam_drw")},
    "keep-light": {100: (*_WITHOUT_WEIGHTS, "ldam_drw"), 50: _WITHOUT_WEIGHTS},
    "keep-lighter": {100: _WITHOUT_WEIGHTS, 50: _WITHOUT_WEIGHTS},
    "stay-light": {100: (*_WITHOUT_WEIGHTS, "ldam_drw")},
    "keep-late": {100: (*_WITHOUT_WEIGHTS, "ldam_drw")},
    "late-light": {100: (*_WITHOUT_WEIGHTS, "ldam_drw")},
    "keep-soft": {100: ("ldam_drw",)},
    "keep-margin": {100: ("ldam_drw",), 50: ("ldam_drw",), 10: ("ldam_drw",)},
    "drop-late": {100: _WITHOUT_WEIGHTS},
    "drop-rest": {100: _WITHOUT_WEIGHTS},
}
#: Variants with two convolutions in every head at imbalance 100: with which losses.
DEEP = {
    "plain": LOSSES,
    "keep": LOSSES,
    "keep-light": _WITHOUT_WEIGHTS,
    "stay": (*_WITHOUT_WEIGHTS, "ldam_drw"),
    "keep-margin": ("ldam_drw",),
}
#: Variants that are trained again on NEW_SEEDS, by loss: the one that was the most accurate on
#: SEEDS at imbalance 100 with one convolution in every head. Also "stay-light", which was the most
#: accurate after six seeds, and "keep-margin", the default of `elf-fast train` with LDAM.
AGAIN = {
    "ce": ("keep-light",),
    "balanced_softmax": ("stay", "stay-light"),
    "ldam_drw": ("stay", "keep-margin"),
}


@dataclass(frozen=True, order=True)
class Run:
    """One training. Two runs that differ only in `variant` are a pair: they have the same split,
    initial weights of shared parameters, order and augmentation of the samples."""

    imbalance: int
    loss: str
    head: str
    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.loss}, imbalance {self.imbalance}, {self.head}, {self.variant}, {self.seed}"


def table() -> list[Run]:
    """Every run, the most informative first. The seeds of one comparison follow each other, each
    with all its variants."""
    runs = [
        Run(imbalance, loss, head, variant, seed)
        for head, imbalance, loss in product(HEADS, IMBALANCES, LOSSES)
        for seed, variant in product(SEEDS, TABLE)
    ]
    runs += [
        Run(imbalance, loss, "conv", variant, seed)
        for seed, variant in product(SEEDS, TRIED)
        for imbalance, tried in TRIED[variant].items()
        for loss in tried
    ]
    runs += [
        Run(100, loss, "deep", variant, seed)
        for seed, variant in product(SEEDS, DEEP)
        for loss in DEEP[variant]
    ]
    runs += [
        Run(100, loss, "conv", variant, seed)
        for seed in NEW_SEEDS
        for loss, variants in AGAIN.items()
        for variant in ("plain", *variants)
    ]
    return runs


def select(runs: Sequence[Run], only: Sequence[str]) -> list[Run]:
    """The runs that pass every filter "field=value" or "field=value,value".

    Raises:
        ValueError: a filter does not name a field of `Run`, or names a value that no run has.
    """
    chosen = list(runs)
    names = [field.name for field in fields(Run)]
    for text in only:
        name, _, values = text.partition("=")
        if name not in names:
            raise ValueError(f"--only: expected {'|'.join(names)}=value,..., got {text!r}")
        known = {str(getattr(run, name)) for run in runs}
        wanted = set(values.split(","))
        if not wanted <= known:
            raise ValueError(
                f"--only: expected values of {name} among {', '.join(sorted(known))}, "
                f"got {', '.join(sorted(wanted - known))}"
            )
        chosen = [run for run in chosen if str(getattr(run, name)) in wanted]
    return chosen
