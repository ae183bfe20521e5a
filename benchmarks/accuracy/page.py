"""Fills page.md with the results and writes it as docs/accuracy.md.

python -m benchmarks.accuracy.page [--results FILE] [--cifar10-results FILE] [--output FILE]
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, median, stdev

from . import cifar, results
from .comparisons import (
    CLAIMED_POINTS,
    HARMLESS_POINTS,
    Comparison,
    Records,
    Setting,
    again,
    claim,
    common_seeds,
    compare,
    harm,
    in_table,
    settings,
    tested,
    together,
    tried,
)
from .paired import LEAST_SEEDS, Difference
from .runs import HEADS, VARIANTS, table
from .trial import FLOPS_LIMIT

TEMPLATE = Path(__file__).with_name("page.md")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "accuracy.md"
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


def page(records: Records, cifar10: Records) -> str:
    """The page, in Markdown, from the runs on digits and on CIFAR-10."""
    best = in_table(records, point="best")
    return TEMPLATE.read_text(encoding="utf-8").format(
        in_short="\n".join(
            [
                *_claims(records, best),
                *_costs_of_dropping(records),
                *_best_tried(records),
                *_on_new_seeds(records),
            ]
        ),
        best=_against_plain(best),
        safe=_against_plain(in_table(records, point="safe")),
        dropping=_dropping(records),
        tried=_tried(records),
        again=_against_plain(again(records, point="best")),
        figures=_figures(records),
        cifar10=_cifar10(cifar10),
        cifar10_done=f"{len(cifar10)} of {len(cifar.table())}",
        origin=_origin(records),
    )


def _claims(records: Records, rows: Sequence[Comparison]) -> list[str]:
    """ELF against the network without exits, in sentences."""
    verdicts = Counter(claim(c) for c in rows)
    holding = sorted({NAMES[c.setting.loss] for c in rows if claim(c) == "holds"})
    lines = [
        f"- ELF's claim, read as {CLAIMED_POINTS:g} points above the same loss without exits at no "
        f"more than {100 * FLOPS_LIMIT:.0f}% of its FLOPs, is "
        f"{'reached' if len(holding) > 1 else 'NOT reached'} for two losses: of {len(rows)} "
        f"comparisons it holds in {verdicts['holds']}"
        f"{' (' + ', '.join(holding) + ')' if holding else ''}, is open in {verdicts['open']} "
        f"(the interval reaches above and below) and fails in {verdicts['fails']}."
    ]
    for says, clear in (
        ("less", [c for c in rows if c.difference.high < 0]),
        ("more", [c for c in rows if c.difference.low > 0]),
    ):
        where = "; ".join(
            f"{NAMES[c.setting.loss]} at {c.setting.imbalance}, {NAMES[c.setting.head]} head, "
            f"{NAMES[c.ours]}: {_points(c.difference.mean)}"
            for c in clear
        )
        lines.append(
            f"- It is {says} accurate than the network without exits, beyond chance, in "
            f"{len(clear)} of {len(rows)}{' (' + where + ')' if where else ''}."
        )
    for ours in ("keep", "drop"):
        if whole := together(records, ours, "plain", point="best"):
            of_heads = {
                head: together(records, ours, "plain", point="best", heads=[head]) for head in HEADS
            }
            by_head = ", ".join(
                f"{_interval(found[1])} with {NAMES[head]} heads"
                for head, found in of_heads.items()
                if found is not None
            )
            lines.append(
                f"- With samples {NAMES[ours]}, over the {whole[0]} settings that have all seeds, "
                f"it differs by {_interval(whole[1])} points{f': {by_head}' if by_head else ''}."
            )
    return lines


def _costs_of_dropping(records: Records) -> list[str]:
    rows = compare(records, "drop", "keep", point="best")
    verdicts = Counter(harm(c.difference) for c in rows)
    lines = [
        f"- Dropping against keeping: harmless (the interval ends above -{HARMLESS_POINTS:g}) in "
        f"{verdicts['none']} of {len(rows)} comparisons, harmful in {verdicts['some']}, open in "
        f"{verdicts['open']}."
    ]
    if whole := together(records, "drop", "keep", point="best"):
        lines.append(
            f"- Over the {whole[0]} settings that have all seeds, dropping differs from keeping by "
            f"{_interval(whole[1])} points: "
            + {
                "none": "it costs no accuracy.",
                "some": "it costs accuracy, and keeping is the better default for training.",
                "open": f"a cost above {HARMLESS_POINTS:g} is not ruled out.",
            }[harm(whole[1])]
        )
    return lines


def _best_tried(records: Records) -> list[str]:
    rows = tried(records, point="best")
    if not rows:
        return []
    best = max(rows, key=lambda c: c.difference.mean)
    gaining = sum(c.difference.low > 0 for c in rows)
    return [
        f"- Of {len(rows)} comparisons of what else was tried with the network without exits, "
        f"{gaining} gain beyond chance. The largest gain is {_interval(best.difference)} points "
        f"({NAMES[best.setting.loss]} at {best.setting.imbalance}; {NAMES[best.setting.head]} "
        f"head, {NAMES[best.ours]}): the best of many, so its interval promises too much."
    ]


def _on_new_seeds(records: Records) -> list[str]:
    rows = again(records, point="best")
    if not rows:
        return []
    found = "; ".join(
        f"{NAMES[c.setting.loss]}, {NAMES[c.ours]}: {_interval(c.difference)}" for c in rows
    )
    return [f"- The best of it, on seeds that it was not chosen by, at imbalance 100: {found}."]


def _against_plain(rows: Iterable[Comparison]) -> str:
    return _table(
        [*_SETTING, "samples that left", *_OUTCOME],
        ([*_setting(c.setting, c.seeds), NAMES[c.ours], *_outcome(c)] for c in rows),
    )


def _outcome(c: Comparison) -> list[str]:
    return [
        f"{c.accuracy[1]:.1f}%",
        f"{c.accuracy[0]:.1f}%",
        _interval(c.difference),
        f"{100 * c.flops_share:.0f}%",
        claim(c),
    ]


def _cifar10(records: Records) -> str:
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
                _interval(c.difference),
                *(_interval(g[c.setting].difference) if c.setting in g else "" for g in of_group),
                f"{100 * c.flops_share:.0f}%",
                claim(c),
                _interval(chosen[c.setting].difference),
                f"{100 * chosen[c.setting].flops_share:.0f}%",
            ]
            for c in compare(records, "keep", "plain", point="best")
        ),
    )  # fmt: skip


def _dropping(records: Records) -> str:
    best, few, full = (
        {c.setting: c for c in compare(records, "drop", "keep", point=point, key=key)}
        for point, key in (("best", "overall"), ("best", "few"), ("full", "overall"))
    )
    return _table(
        [*_SETTING, "best", "best, few-shot", "exits off", "harm"],
        (
            [
                *_setting(setting, c.seeds),
                *(_interval(at[setting].difference) for at in (best, few, full)),
                harm(c.difference),
            ]
            for setting, c in best.items()
        ),
    )


def _tried(records: Records) -> str:
    kept, exits_off = (
        {
            (c.ours, c.setting): _interval(c.difference)
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


def _figures(records: Records) -> str:
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


def _origin(records: Records) -> str:
    seconds = [record["seconds"] for record in records.values()]
    known = {
        key: ", ".join(sorted({record["environment"][key] for record in records.values()}))
        for key in ("torch", "cpu", "threads")
    }
    return (
        f"{len(records)} of the {len(table())} runs of the table are there. A run took "
        f"{median(seconds):.0f} s (median, beside other work) with {known['threads']} thread on "
        f"{known['cpu']}; torch {known['torch']}."
    )


def _setting(setting: Setting, seeds: Sequence[int]) -> list[str]:
    return [NAMES[setting.loss], str(setting.imbalance), NAMES[setting.head], str(len(seeds))]


def _points(value: float) -> str:
    # Adding 0.0 turns a rounded -0.0 into 0.0.
    return f"{round(value, 1) + 0.0:+.1f}"


def _interval(d: Difference) -> str:
    return f"{_points(d.mean)} [{_points(d.low)}, {_points(d.high)}]"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    if len(lines) == 2:
        return "No comparison has three seeds yet."
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.page", description=__doc__)
    parser.add_argument("--results", type=Path, default=results.PATH)
    parser.add_argument("--cifar10-results", type=Path, default=cifar.PATH)
    parser.add_argument("--output", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    try:
        records = results.load(options.results)
        cifar10 = results.load(options.cifar10_results)
    except ValueError as error:
        parser.error(str(error))
    if not records:
        parser.error(f"--results: expected finished runs, found none in {options.results}")
    options.output.write_text(page(records, cifar10), encoding="utf-8")
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
