"""Turns the results of all seeds into the table and the sentences of terminal and report.

A result is (mean, standard deviation over seeds); the deviation is None with one seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from ..groups import FEW_BELOW, GROUPS, MANY_ABOVE, class_groups
from ..page.sections import points
from ..policy import Estimate

#: The three columns: the keys of a run's test results, and their headings.
MODELS = {
    "without_exits": "without exits",
    "never": "ELF, exits off",
    "elf": "ELF",
}


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None for the latter with fewer than two values."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def over_seeds(results: dict[str, Any], model: str, key: str) -> list[float] | None:
    """A test metric of one model for every seed; None for an empty group."""
    values = [run["test"][model][key] for run in results["runs"]]
    return None if None in values else values


def differences(
    results: dict[str, Any], key: str, *, than: str = "without_exits"
) -> list[float] | None:
    """ELF minus another model, seed by seed; None for an empty group."""
    ours, theirs = over_seeds(results, "elf", key), over_seeds(results, than, key)
    if ours is None or theirs is None:
        return None
    return [a - b for a, b in zip(ours, theirs, strict=True)]


def percent(values: Sequence[float] | None, digits: int = 1) -> str:
    if values is None:
        return "none"
    mean, std = mean_std(values)
    spread = "" if std is None else f" ± {100 * std:.{digits}f}"
    return f"{100 * mean:.{digits}f}{spread}"


def table(results: dict[str, Any]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """(headings, rows): every row a label and one cell per model of MODELS."""
    seeds = len(results["runs"])
    groups = class_groups(results["class_counts"])
    limits = {
        "many": f"over {MANY_ABOVE}",
        "medium": f"{FEW_BELOW} to {MANY_ABOVE}",
        "few": f"under {FEW_BELOW}",
    }
    labels = {
        name: f"  {name} ({_count(len(groups[name]), 'class', 'es')}, {limits[name]} images)"
        for name in GROUPS
    }
    rows = [
        (label, [percent(over_seeds(results, model, key)) for model in MODELS])
        for key, label in {"overall": "test accuracy, %", **labels}.items()
    ]
    rows.append(
        ("FLOPs per image, % of without exits",
         [percent(over_seeds(results, model, "flops_share"), 0) for model in MODELS])
    )  # fmt: skip
    shares = []
    for model in MODELS:
        per_seed = over_seeds(results, model, "exit_shares") or []
        means = [statistics.fmean(column) for column in zip(*per_seed, strict=True)]
        shares.append(" / ".join(f"{100 * share:.0f}" for share in means) if means[1:] else "")
    rows.append(("left at exit 1 / 2 / 3, %", shares))
    for entry in results["throughput"]:
        rate = {name: f"{q[1]:,.0f}" for name, q in entry["images_per_second"].items()}
        rows += [
            (f"images/s, batch {entry['batch_size']}: full network", [rate["full"], "", ""]),
            ("  ELF, reference", ["", rate["reference_off"], rate["reference"]]),
            ("  ELF, elf_fast", ["", rate["elf_fast_off"], rate["elf_fast"]]),
        ]
    spread = f", mean ± std of {seeds} seeds" if seeds > 1 else ", 1 seed"
    return [f"Long-tailed digits{spread}", *MODELS.values()], rows


def _count(n: int, noun: str, plural: str = "s") -> str:
    return f"{n} {noun}{plural if n != 1 else ''}"


def t_interval(values: Sequence[float]) -> Estimate | None:
    """The mean over seeds and its 95% confidence interval (Student's t); None for one seed."""
    from scipy.special import stdtrit  # type: ignore[import-untyped]

    mean, std = mean_std(values)
    if std is None:
        return None
    half = float(stdtrit(len(values) - 1, 0.975)) * std / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def sentences(results: dict[str, Any]) -> list[str]:
    """The results in at most four sentences, a loss as plainly as a gain."""
    return [_accuracy(results), *_groups(results), _speed(results), _method(results)]


def _accuracy(results: dict[str, Any]) -> str:
    overall = differences(results, "overall") or []
    share = statistics.fmean(over_seeds(results, "elf", "flops_share") or [])
    says = f"At {100 * share:.0f}% of the FLOPs of the network without exits, ELF "
    estimate, mean = t_interval(overall), statistics.fmean(overall)
    if estimate is None:
        return (
            f"{says}differs from it by {100 * mean:+.1f} points of accuracy; with one seed this is "
            "weak evidence, because accuracy varies by points between seeds."
        )
    by = f"{points(estimate)} points of accuracy over {len(overall)} seeds"
    if estimate.low <= 0 <= estimate.high:
        return f"{says}differs from it by {by}, which may be chance."
    return f"{says}is {'more' if mean > 0 else 'less'} accurate, by {by}."


def _groups(results: dict[str, Any]) -> list[str]:
    """Where ELF loses beyond chance; nothing with one seed."""
    found = {}
    for name in GROUPS:
        values = differences(results, name)
        found[name] = None if values is None else t_interval(values)
    known = {name: estimate for name, estimate in found.items() if estimate is not None}
    if not known:
        return []
    losing = [f"{name} ({points(e)})" for name, e in known.items() if e.high < 0]
    if not losing:
        return ["It loses accuracy beyond chance in no group of classes."]
    return [f"It loses accuracy beyond chance in these groups of classes: {', '.join(losing)}."]


def _speed(results: dict[str, Any]) -> str:
    parts = []
    for entry in results["throughput"]:
        ratio = {name: q[1] for name, q in entry["ratios"].items()}
        parts.append(
            f"{entry['batch_size']} at a time at {ratio['elf_fast/full']:.2f} times the speed of "
            f"the network without exits ({ratio['elf_fast_off/full']:.2f} if no image leaves early)"
        )
    return f"Images pass {' and '.join(parts)}."


def _method(results: dict[str, Any]) -> str:
    size = results["split"]
    return (
        f"Both networks were trained alike on {size['train']} images, the thresholds were chosen "
        f"on {size['validation']} others, and the {size['test']} test images had no part in either."
    )
