"""Turns the results of all seeds into the table and the sentences of terminal and report.

A result is (mean, standard deviation over seeds); the deviation is None with one seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from ..metrics import FEW_BELOW, GROUPS, MANY_ABOVE, class_groups

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


def _points(values: Sequence[float]) -> str:
    mean, std = mean_std(values)
    spread = "" if std is None else f" ± {100 * std:.1f}"
    # Adding 0.0 turns a rounded -0.0 into 0.0.
    return f"{round(100 * mean, 1) + 0.0:+.1f}{spread} points"


def _is_clear(values: Sequence[float]) -> bool:
    """Whether 0 lies outside the 95% confidence interval (Student's t) of a mean over seeds."""
    from scipy.special import stdtrit  # type: ignore[import-untyped]

    mean, std = mean_std(values)
    n = len(values)
    return std is not None and abs(mean) > stdtrit(n - 1, 0.975) * std / math.sqrt(n)


def sentences(results: dict[str, Any]) -> list[str]:
    """The results in sentences. A loss of accuracy or speed is stated as plainly as a gain."""
    return [*_accuracy(results), *_tail(results), *_speed(results), *_method(results)]


def _accuracy(results: dict[str, Any]) -> list[str]:
    seeds = len(results["runs"])
    share = statistics.fmean(over_seeds(results, "elf", "flops_share") or [])
    overall = differences(results, "overall")
    assert overall is not None
    mean = statistics.fmean(overall)
    says = f"ELF uses {100 * share:.0f}% of the FLOPs of the network without exits and "
    if mean < 0:
        says += f"LOSES accuracy overall: {_points(overall)}"
    elif mean > 0:
        says += f"gains accuracy overall: {_points(overall)}"
    else:
        says += "has the same accuracy overall"
    if seeds > 1:
        says += f", paired over {seeds} seeds"
        if mean != 0 and not _is_clear(overall):
            says += "; the 95% interval includes 0, so read it as a tie"
    lines = [says + "."]
    losing = []
    for name in GROUPS:
        values = differences(results, name)
        if values is not None and statistics.fmean(values) < 0:
            noise = "" if _is_clear(values) else ", 95% interval includes 0"
            losing.append(f"{name} ({_points(values)}{noise if seeds > 1 else ''})")
    lines.append(
        f"Where ELF loses accuracy: {', '.join(losing)}."
        if losing
        else "ELF loses accuracy in none of the groups that have classes."
    )
    if seeds == 1:
        lines.append("One seed is weak evidence: accuracy varies by points between seeds.")
    lines.append(
        "Compared with the same ELF with its exits off, leaving early changes test accuracy by "
        f"{_points(differences(results, 'overall', than='never') or [])}."
    )
    return lines


def _speed(results: dict[str, Any]) -> list[str]:
    lines = []
    for entry in results["throughput"]:
        ratio = {name: _speed_up(q) for name, q in entry["ratios"].items()}
        lines.append(
            f"Batch {entry['batch_size']}: elf_fast runs at {ratio['elf_fast/full']} of the full "
            f"network's speed and {ratio['elf_fast/reference']} of the reference's (ELF in plain "
            f"PyTorch); with its exits off, when no sample leaves, at "
            f"{ratio['elf_fast_off/full']} of the full network's."
        )
    seconds = {
        model: statistics.fmean([run["seconds"][model] for run in results["runs"]])
        for model in ("without_exits", "elf")
    }
    slowdown = seconds["elf"] / seconds["without_exits"]
    lines.append(
        f"Training ELF took {slowdown:.2f}x as long as training the network without exits"
        f"{' (SLOWER)' if slowdown > 1 else ''}."
    )
    return lines


def _speed_up(quartiles: Sequence[float]) -> str:
    low, median, high = quartiles
    says = "level" if low <= 1 <= high else "SLOWER" if median < 1 else "faster"
    return f"{median:.2f}x ({says}; {low:.2f} to {high:.2f})"


def _tail(results: dict[str, Any]) -> list[str]:
    """Share of the test images of the first (head) and last (tail) class that leave at exit 1."""
    per_seed = [run["test"]["elf"]["exit_shares_by_class"] for run in results["runs"]]
    counts = results["class_counts"]
    share = {c: statistics.fmean(classes[c][0] for classes in per_seed) for c in (0, -1)}
    return [
        f"Exit 1 takes {100 * share[0]:.0f}% of the test images of the head class "
        f"({counts[0]} training images) and {100 * share[-1]:.0f}% of those of the last tail class "
        f"({counts[-1]})."
    ]


def _method(results: dict[str, Any]) -> list[str]:
    size = results["split"]
    thresholds = ", ".join(
        "off" if run["threshold"] is None else f"{run['threshold']:g}" for run in results["runs"]
    )
    kept = results["settings"]["drop_exited"] is False
    lines = [
        f"Both networks: {results['settings']['loss_name']}, the same schedule, batches and "
        f"seeds; last epoch; {size['train']} training, {size['validation']} validation and "
        f"{size['test']} test images. All seeds use one split; they change weights and batches.",
        f"Thresholds ({thresholds}) are the most accurate on validation, of equals the cheapest; "
        "the test images were not used to choose them.",
    ]
    if kept:
        lines.append(
            "In training, samples that left stay in the batch with weight 0 (drop_exited=False); "
            "dropping them gave deeper layers that were less accurate on data outside the test set."
        )
    return lines
