"""The tables of docs/accuracy.md, and how it writes names, settings and differences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean, stdev

from .comparisons import (
    Comparison,
    Records,
    Setting,
    claim,
    common_seeds,
    compare,
    harm,
    settings,
    tested,
    tried,
)
from .paired import LEAST_SEEDS, Difference
from .runs import VARIANTS

NAMES = {
    "ce": "cross-entropy",
    "balanced_softmax": "balanced softmax",
    "ldam_drw": "LDAM-DRW",
    "logit_adjustment": "logit adjustment",
    "conv": "convolution",
    "pooled": "pool",
    "deep": "two-convolution",
    "plain": "without exits",
    "keep": "kept",
    "drop": "dropped",
    "stay": "kept, none leaves in training",
    "keep-0.99": "kept, training threshold 0.99 (not 0.9)",
    "keep-light": "kept, exit weights 1/3, 2/3, 1 (not 1, 1, 1)",
    "keep-lighter": "kept, exit weights 0.1, 0.3, 1",
    "stay-light": "kept, none leaves in training, exit weights 1/3, 2/3, 1",
    "keep-late": "kept, none leaves in the first half of the epochs",
    "late-light": "kept, none leaves in the first half of the epochs, exit weights 1/3, 2/3, 1",
    "keep-soft": "kept, the exit test reads logits at a third of the scale",
    "keep-margin": "kept, the exit test in training reads logits less the margins",
    "drop-late": "dropped, in the second half of the epochs",
    "drop-rest": "dropped, BatchNorm at rest under 32 samples",
}
_SETTING = ("loss", "imbalance", "head", "seeds")
_OUTCOME = ("without exits", "ELF", "difference", "FLOPs", "claim")


def against_plain(rows: Iterable[Comparison]) -> str:
    """Networks with exits against the one without."""
    return _table(
        [*_SETTING, "samples that left", *_OUTCOME],
        ([*_setting(c.setting, c.seeds), NAMES[c.ours], *_outcome(c)] for c in rows),
    )


def _outcome(c: Comparison) -> list[str]:
    return [
        f"{c.accuracy[1]:.1f}%",
        f"{c.accuracy[0]:.1f}%",
        interval(c.difference),
        f"{100 * c.flops_share:.0f}%",
        claim(c),
    ]


def cifar10(records: Records) -> str:
    """The same on CIFAR-10-LT, with the difference in each group of classes."""
    groups = ("many", "medium", "few")
    of_group = [
        {c.setting: c for c in compare(records, "keep", "plain", point="best", key=key)}
        for key in groups
    ]
    chosen = {c.setting: c for c in compare(records, "keep", "plain", point="chosen")}
    return _table(
        [*_SETTING, "without exits", "ELF", "difference", *groups, "FLOPs", "claim",
         "without a limit", "FLOPs"],
        (
            [
                *_setting(c.setting, c.seeds),
                f"{c.accuracy[1]:.1f}%",
                f"{c.accuracy[0]:.1f}%",
                interval(c.difference),
                *(interval(g[c.setting].difference) if c.setting in g else "" for g in of_group),
                f"{100 * c.flops_share:.0f}%",
                claim(c),
                interval(chosen[c.setting].difference),
                f"{100 * chosen[c.setting].flops_share:.0f}%",
            ]
            for c in compare(records, "keep", "plain", point="best")
        ),
    )  # fmt: skip


def dropping(records: Records) -> str:
    """Dropping the samples that left against keeping them."""
    best, few, full = (
        {c.setting: c for c in compare(records, "drop", "keep", point=point, key=key)}
        for point, key in (("best", "overall"), ("best", "few"), ("full", "overall"))
    )
    return _table(
        [*_SETTING, "best", "best, few-shot", "exits off", "harm"],
        (
            [
                *_setting(setting, c.seeds),
                *(interval(at[setting].difference) for at in (best, few, full)),
                harm(c.difference),
            ]
            for setting, c in best.items()
        ),
    )


def all_tried(records: Records) -> str:
    """The other variants, against the network without exits and against keeping."""
    kept, exits_off = (
        {
            (c.ours, c.setting): interval(c.difference)
            for variant in VARIANTS
            if variant != theirs
            for c in compare(records, variant, theirs, point=point)
        }
        for theirs, point in (("keep", "best"), ("plain", "full"))
    )
    return _table(
        ["samples that left", *_SETTING, *_OUTCOME, "against kept", "exits off"],
        (
            [
                NAMES[c.ours],
                *_setting(c.setting, c.seeds),
                *_outcome(c),
                kept.get((c.ours, c.setting), ""),
                exits_off[c.ours, c.setting],
            ]
            for c in tried(records, point="best")
        ),
    )


def all_results(records: Records) -> str:
    """Every variant in every setting."""
    rows = []
    for setting in settings(records):
        for variant in VARIANTS:
            seeds = common_seeds(records, setting, variant)
            if len(seeds) >= LEAST_SEEDS:
                rows.append([*_setting(setting, seeds), *_row(records, setting, variant, seeds)])
    return _table(
        [*_SETTING, "samples that left", "overall", "many", "medium", "few", "ECE", "FLOPs",
         "left at exit 1 / 2 / 3", "of few", "early wrong", "of few"],
        rows,
    )  # fmt: skip


def _row(records: Records, setting: Setting, variant: str, seeds: Sequence[int]) -> list[str]:
    tests = tested(records, setting, variant, seeds, "best")
    overall = [100 * test["overall"] for test in tests]
    cells = [NAMES[variant], f"{fmean(overall):.1f} ± {stdev(overall):.1f}"]
    for key in ("many", "medium", "few", "ece", "flops_share"):
        cells.append(f"{100 * fmean(test[key] for test in tests):.1f}")
    if variant == "plain":
        return [*cells, "", "", "", ""]
    few_left = [test["exit_shares_by_group"]["few"] for test in tests]
    few_wrong = [test["early_wrong_by_group"]["few"] for test in tests]
    return [
        *cells,
        _shares([test["exit_shares"] for test in tests]),
        _shares(few_left),
        f"{100 * fmean(test['early_wrong'] for test in tests):.1f}",
        f"{100 * fmean(few_wrong):.1f}",
    ]


def _shares(of_seeds: Iterable[Sequence[float]]) -> str:
    return " / ".join(f"{100 * fmean(share):.0f}" for share in zip(*of_seeds, strict=True))


def _setting(setting: Setting, seeds: Sequence[int]) -> list[str]:
    return [NAMES[setting.loss], str(setting.imbalance), NAMES[setting.head], str(len(seeds))]


def points(value: float) -> str:
    # Adding 0.0 turns a rounded -0.0 into 0.0.
    return f"{round(value, 1) + 0.0:+.1f}"


def interval(d: Difference) -> str:
    return f"{points(d.mean)} [{points(d.low)}, {points(d.high)}]"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    if len(lines) == 2:
        return "No comparison has three seeds yet."
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
