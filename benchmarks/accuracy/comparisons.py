"""Compares two variants over all settings, and judges the differences.

Accuracies and their differences are in percentage points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from .paired import LEAST_SEEDS, Difference, difference
from .runs import HEADS, NEW_SEEDS, SEEDS, TABLE, VARIANTS, Run
from .trial import FLOPS_LIMIT

Records = Mapping[Run, Mapping[str, Any]]

#: The claim of ELF (arXiv 2006.11979, abstract: more than 3 points, up to 20% of the FLOPs saved).
#: Here it means: in comparison with the same loss without exits.
CLAIMED_POINTS = 3.0
#: Dropping the samples that left may cost this much against keeping them and still count as
#: harmless.
HARMLESS_POINTS = 0.5


class Setting(NamedTuple):
    """What the two runs of a pair have in common, apart from the seed."""

    imbalance: int
    loss: str
    head: str


class Comparison(NamedTuple):
    setting: Setting
    ours: str  # variant
    seeds: tuple[int, ...]
    accuracy: tuple[float, float]  # means: ours, theirs
    difference: Difference
    flops_share: float  # ours, mean


def settings(records: Records) -> list[Setting]:
    return sorted({Setting(run.imbalance, run.loss, run.head) for run in records})


def common_seeds(
    records: Records, setting: Setting, *variants: str, of: Sequence[int] = SEEDS
) -> tuple[int, ...]:
    """The seeds for which every one of the variants has finished."""
    return tuple(seed for seed in of if all(Run(*setting, v, seed) in records for v in variants))


def tested(
    records: Records, setting: Setting, variant: str, seeds: Sequence[int], point: str
) -> list[Mapping[str, Any]]:
    """The test metrics of every seed at an operating point. A network without exits has only the
    point "full", which is returned for every other one."""
    tests = [records[Run(*setting, variant, seed)]["test"] for seed in seeds]
    return [test["full"] if variant == "plain" else test[point] for test in tests]


def compare(
    records: Records,
    ours: str,
    theirs: str,
    *,
    point: str,
    key: str = "overall",
    of: Sequence[int] = SEEDS,
) -> list[Comparison]:
    """One comparison for every setting in which at least LEAST_SEEDS seeds have both variants. The
    one that is worst for `ours` comes first.

    Args:
        key: an accuracy: overall, many, medium or few. Settings without such a class are left out.
    """
    found = []
    for setting in settings(records):
        seeds = common_seeds(records, setting, ours, theirs, of=of)
        if len(seeds) < LEAST_SEEDS:
            continue
        a = tested(records, setting, ours, seeds, point)
        b = tested(records, setting, theirs, seeds, point)
        if a[0][key] is None:
            continue
        left, right = ([100 * test[key] for test in tests] for tests in (a, b))
        found.append(
            Comparison(
                setting,
                ours,
                seeds,
                (fmean(left), fmean(right)),
                difference(left, right),
                fmean(test["flops_share"] for test in a),
            )
        )
    return sorted(found, key=lambda c: c.difference.mean)


def in_table(records: Records, *, point: str) -> list[Comparison]:
    """Every comparison of the table of a network with exits and the one without, the worst
    first."""
    found = [c for ours in TABLE[1:] for c in compare(records, ours, "plain", point=point)]
    return sorted((c for c in found if c.setting.head in HEADS), key=lambda c: c.difference.mean)


def tried(records: Records, *, point: str) -> list[Comparison]:
    """The same for the variants and heads that are not of the table, variant by variant."""
    table = in_table(records, point=point)
    return [c for c in _of_all_variants(records, point, SEEDS) if c not in table]


def again(records: Records, *, point: str) -> list[Comparison]:
    """The same for the variants that were trained again, on the new seeds."""
    return _of_all_variants(records, point, NEW_SEEDS)


def _of_all_variants(records: Records, point: str, of: Sequence[int]) -> list[Comparison]:
    with_exits = [variant for variant, exits in VARIANTS.items() if exits is not None]
    return [c for v in with_exits for c in compare(records, v, "plain", point=point, of=of)]


def together(
    records: Records, ours: str, theirs: str, *, point: str, heads: Sequence[str] = HEADS
) -> tuple[int, Difference] | None:
    """How many settings with such heads have all seeds, and the difference in accuracy averaged
    over these settings; None if there are fewer than two. The interval is over the seeds, because
    all settings of a seed have the same draws."""
    complete = [
        s
        for s in settings(records)
        if s.head in heads and common_seeds(records, s, ours, theirs) == SEEDS
    ]
    if len(complete) < 2:
        return None
    means = [
        [
            100 * fmean(test["overall"] for test in of_seed)
            for of_seed in zip(
                *(tested(records, s, variant, SEEDS, point) for s in complete), strict=True
            )
        ]
        for variant in (ours, theirs)
    ]
    return len(complete), difference(*means)


def claim(comparison: Comparison) -> str:
    """Whether ELF gains CLAIMED_POINTS within FLOPS_LIMIT: "holds" if the whole interval reaches
    them, "fails" if none of it does or if it uses too many FLOPs, else "open"."""
    # Thresholds keep the limit on validation. On test the share may be half a percent larger.
    if round(comparison.flops_share, 2) > FLOPS_LIMIT:
        return "fails"
    if comparison.difference.high < CLAIMED_POINTS:
        return "fails"
    return "holds" if comparison.difference.low >= CLAIMED_POINTS else "open"


def harm(dropping: Difference) -> str:
    """What dropping costs against keeping: "none" if the interval allows at most HARMLESS_POINTS,
    else "some" if the whole interval lies below 0, else "open"."""
    if dropping.low >= -HARMLESS_POINTS:
        return "none"
    return "some" if dropping.high < 0 else "open"
