"""Runs and records that the tests of benchmarks/accuracy use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.accuracy import runs
from benchmarks.accuracy.runs import Run
from elf_fast.training.loop import Schedule

BRIEF = Schedule(epochs=1)


def variants(**fields: Any) -> dict[str, Run]:
    """A run of every variant; they differ in nothing else."""
    setting = {"imbalance": 100, "loss": "ce", "head": "conv", "seed": 3, **fields}
    return {name: Run(**setting, variant=name) for name in runs.VARIANTS}


RUNS = list(variants().values())[:3]


def brief_record(**fields: Any) -> dict[str, Any]:
    """As much of a record as the results file and the command need."""
    return {"test": {"full": {"overall": 0.5}}, "seconds": 1.0, **fields}


def records(
    setting: tuple[int, str, str],
    gains: dict[str, float],
    seeds: Sequence[int] = runs.SEEDS,
    flops: float = 0.7,
) -> dict[Run, dict[str, Any]]:
    """Records in which each variant gains so many points over the network without exits. The
    accuracy of that network is 60% with seed 0 and rises by 2 points a seed. A gain is 0.1 points
    larger with odd seeds and 0.1 smaller with even ones."""
    made = {}
    for variant, gain in gains.items():
        plain = variant == "plain"
        for seed in seeds:
            varies = 0.0 if plain else gain + (0.1 if seed % 2 else -0.1)
            overall = 0.6 + 0.02 * seed + varies / 100
            shares = [1.0] if plain else [0.25, 0.25, 0.5]
            tested = {
                **dict.fromkeys(("many", "medium", "few"), overall),
                "overall": overall,
                "ece": 0.1,
                "exit_shares": shares,
                "exit_shares_by_group": {"few": shares},
                "early_wrong": 0.02,
                "early_wrong_by_group": {"few": 0.01},
                "flops_share": 1.0 if plain else flops,
            }
            points = ("full",) if plain else ("full", "safe", "best")
            made[Run(*setting, variant, seed)] = {
                "test": dict.fromkeys(points, tested),
                "seconds": 10.0,
                "environment": {"torch": "2", "cpu": "a", "threads": "1"},
            }
    return made
