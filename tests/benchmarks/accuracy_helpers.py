"""Runs and records that the tests of benchmarks/accuracy use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.accuracy import runs
from benchmarks.accuracy.runs import Run
from elf_fast.demo.loop import Schedule

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
    exits_off: float = 0.0,
    safe: float = 0.0,
) -> dict[Run, dict[str, Any]]:
    """Records in which each variant gains so many points over the network without exits.

    The accuracy of that network is 60% with seed 0 and rises by 2 points a seed. A gain is 0.1
    points larger with odd seeds and 0.1 smaller with even ones; of the few-shot classes it is twice
    as large.

    Args:
        flops: share that the variants use.
        exits_off, safe: points that each gains more at these operating points than at the best one.
    """
    more = {"full": exits_off, "safe": safe, "best": 0.0}
    made = {}
    for variant, gain in gains.items():
        for seed in seeds:
            plain = 0.6 + 0.02 * seed
            odd = 0.1 if seed % 2 else -0.1
            if variant == "plain":
                test = {"full": _tested(plain, plain, [1.0], 1.0)}
            else:
                gained = {point: (gain + odd + extra) / 100 for point, extra in more.items()}
                test = {
                    point: _tested(plain + g, plain + 2 * g, [0.25, 0.25, 0.5], flops)
                    for point, g in gained.items()
                }
            made[Run(*setting, variant, seed)] = {
                "test": test,
                "seconds": 10.0,
                "environment": {"torch": "2", "cpu": "a", "threads": "1"},
            }
    return made


def _tested(overall: float, few: float, shares: list[float], flops: float) -> dict[str, Any]:
    """The metrics of a test."""
    return {
        "overall": overall,
        "many": overall,
        "medium": overall,
        "few": few,
        "ece": 0.1,
        "exit_shares": shares,
        "exit_shares_by_group": {"few": shares},
        "early_wrong": 0.02,
        "early_wrong_by_group": {"few": 0.01},
        "flops_share": flops,
    }
