"""Tables of rows in Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from ..row import Row

#: What no kernel can beat: reading its input, or copying as many bytes as it moves.
LIMITS = ("read-only pass", "copy")


def table(rows: Iterable[Row]) -> list[str]:
    lines = [
        "| subject | baseline | shape | ratio | quartiles | target | | subject needs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        median, low, high = row.ratio
        verdict = {True: "holds", False: "**missed**", None: ""}[row.holds]
        lines.append(
            f"| {row.subject} | {row.baseline} | {row.shape} | {median:.3g} | "
            f"{low:.3g} to {high:.3g} | {row.asked} | {verdict} | {row.needed} |"
        )
    return lines


def verdicts(rows: list[Row]) -> list[str]:
    """How many targets hold, the rows that miss theirs, and the rows without a target in which the
    subject is slower than a baseline that it can beat."""
    missed = [row for row in rows if row.holds is False]
    judged = [row for row in rows if row.holds is not None]
    behind = [row for row in rows if row.holds is None and _is_behind(row)]
    lines = [f"{len(judged) - len(missed)} of {len(judged)} targets hold.", ""]
    if missed:
        lines += ["### Missed", "", *table(missed), ""]
    if behind:
        lines += [
            "### Behind, without a target", "",
            "Rows whose upper quartile is below 1, except those beside a limit (`oracle`, "
            "`read-only pass`, `copy`).", "", *table(behind), "",
        ]  # fmt: skip
    return lines


def _is_behind(row: Row) -> bool:
    return row.ratio.high < 1 and row.baseline not in ("oracle", *LIMITS)
