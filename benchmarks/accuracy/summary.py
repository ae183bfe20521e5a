"""The results in short: what `summarise` decides, and the sentences that say it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .comparisons import (
    CLAIMED_POINTS,
    HARMLESS_POINTS,
    Comparison,
    Records,
    again,
    claim,
    compare,
    harm,
    in_table,
    together,
    tried,
)
from .paired import Difference
from .runs import HEADS
from .tables import NAMES, interval, points
from .trial import FLOPS_LIMIT


@dataclass(frozen=True)
class Overall:
    """A difference over all settings that have all seeds: how many these are, the difference over
    all of them, and that over those with one kind of head, by head."""

    settings: int
    difference: Difference
    by_head: dict[str, Difference]


@dataclass(frozen=True)
class Summary:
    """Comparisons at the best thresholds. A difference is significant where its whole interval lies
    on one side of 0."""

    table: list[Comparison]  # networks with exits against the one without
    claims: Counter[str]  # verdicts of `claim` over the table
    holding: list[str]  # losses with which the claim holds at least once
    worse: list[Comparison]  # significantly, of the table
    better: list[Comparison]
    overall: dict[str, Overall]  # by variant, against the network without exits
    dropping: list[Comparison]  # against keeping
    harms: Counter[str]  # verdicts of `harm` over `dropping`
    dropping_overall: Overall | None
    tried: list[Comparison]  # of other variants, with the network without exits
    gaining: list[Comparison]  # significantly, of `tried`
    again: list[Comparison]  # on the new seeds

    @property
    def is_reached(self) -> bool:
        """Whether the claim holds with more than one loss."""
        return len(self.holding) > 1

    @property
    def best_tried(self) -> Comparison | None:
        return max(self.tried, key=lambda c: c.difference.mean, default=None)


def summarise(records: Records) -> Summary:
    table = in_table(records, point="best")
    dropping = compare(records, "drop", "keep", point="best")
    others = tried(records, point="best")
    against_plain = {v: _overall(records, v, "plain") for v in ("keep", "drop")}
    return Summary(
        table=table,
        claims=Counter(claim(c) for c in table),
        holding=sorted({c.setting.loss for c in table if claim(c) == "holds"}),
        worse=[c for c in table if c.difference.high < 0],
        better=[c for c in table if c.difference.low > 0],
        overall={v: found for v, found in against_plain.items() if found is not None},
        dropping=dropping,
        harms=Counter(harm(c.difference) for c in dropping),
        dropping_overall=_overall(records, "drop", "keep"),
        tried=others,
        gaining=[c for c in others if c.difference.low > 0],
        again=again(records, point="best"),
    )


def _overall(records: Records, ours: str, theirs: str) -> Overall | None:
    whole = together(records, ours, theirs, point="best")
    if whole is None:
        return None
    of_heads = {h: together(records, ours, theirs, point="best", heads=[h]) for h in HEADS}
    by_head = {head: found[1] for head, found in of_heads.items() if found is not None}
    return Overall(*whole, by_head)


def sentences(summary: Summary) -> list[str]:
    """A line of Markdown for each result."""
    return [
        *_claims(summary),
        *_overall_lines(summary),
        *_costs_of_dropping(summary),
        *_best_tried(summary),
        *_on_new_seeds(summary),
    ]


def _claims(summary: Summary) -> list[str]:
    """ELF against the network without exits."""
    holding = sorted(NAMES[loss] for loss in summary.holding)
    total = len(summary.table)
    lines = [
        f"- ELF's claim, read as {CLAIMED_POINTS:g} points above the same loss without exits at no "
        f"more than {100 * FLOPS_LIMIT:.0f}% of its FLOPs, is "
        f"{'reached' if summary.is_reached else 'NOT reached'} for two losses: of {total} "
        f"comparisons it holds in {summary.claims['holds']}"
        f"{' (' + ', '.join(holding) + ')' if holding else ''}, is open in "
        f"{summary.claims['open']} (the interval reaches above and below) and fails in "
        f"{summary.claims['fails']}."
    ]
    for says, clear in (("less", summary.worse), ("more", summary.better)):
        where = _where(clear)
        lines.append(
            f"- It is {says} accurate than the network without exits, beyond chance, in "
            f"{len(clear)} of {total}{f' ({where})' if where else ''}."
        )
    return lines


def _where(rows: Sequence[Comparison]) -> str:
    return "; ".join(
        f"{NAMES[c.setting.loss]} at {c.setting.imbalance}, {NAMES[c.setting.head]} head, "
        f"{NAMES[c.ours]}: {points(c.difference.mean)}"
        for c in rows
    )


def _overall_lines(summary: Summary) -> list[str]:
    lines = []
    for variant, found in summary.overall.items():
        by_head = ", ".join(
            f"{interval(difference)} with {NAMES[head]} heads"
            for head, difference in found.by_head.items()
        )
        lines.append(
            f"- With samples {NAMES[variant]}, over the {found.settings} settings that have all "
            f"seeds, it differs by {interval(found.difference)} points"
            f"{f': {by_head}' if by_head else ''}."
        )
    return lines


def _costs_of_dropping(summary: Summary) -> list[str]:
    lines = [
        f"- Dropping against keeping: harmless (the interval ends above -{HARMLESS_POINTS:g}) in "
        f"{summary.harms['none']} of {len(summary.dropping)} comparisons, harmful in "
        f"{summary.harms['some']}, open in {summary.harms['open']}."
    ]
    if whole := summary.dropping_overall:
        lines.append(
            f"- Over the {whole.settings} settings that have all seeds, dropping differs from "
            f"keeping by {interval(whole.difference)} points: "
            + {
                "none": "it costs no accuracy.",
                "some": "it costs accuracy, and keeping is the better default for training.",
                "open": f"a cost above {HARMLESS_POINTS:g} is not ruled out.",
            }[harm(whole.difference)]
        )
    return lines


def _best_tried(summary: Summary) -> list[str]:
    best = summary.best_tried
    if best is None:
        return []
    return [
        f"- Of {len(summary.tried)} comparisons of what else was tried with the network without "
        f"exits, {len(summary.gaining)} gain beyond chance. The largest gain is "
        f"{interval(best.difference)} points ({NAMES[best.setting.loss]} at "
        f"{best.setting.imbalance}; {NAMES[best.setting.head]} head, {NAMES[best.ours]}): the best "
        "of many, so its interval promises too much."
    ]


def _on_new_seeds(summary: Summary) -> list[str]:
    if not summary.again:
        return []
    found = "; ".join(
        f"{NAMES[c.setting.loss]}, {NAMES[c.ours]}: {interval(c.difference)}" for c in summary.again
    )
    return [f"- The best of it, on seeds that it was not chosen by, at imbalance 100: {found}."]
