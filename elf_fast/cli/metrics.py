"""Prints the main metrics of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..groups import FEW_BELOW, MANY_ABOVE

_CONFUSIONS = 5  # pairs of classes that are printed
_LABELS = {
    "overall": "accuracy overall, %",
    "many": f"accuracy many (> {MANY_ABOVE} training images), %",
    "medium": f"accuracy medium ({FEW_BELOW} to {MANY_ABOVE}), %",
    "few": f"accuracy few (< {FEW_BELOW}), %",
    "balanced_accuracy": "balanced accuracy, %",
    "f1": "F1 (macro), %",
    "ece": "calibration error, %",
    "flops_share": "FLOPs, % of without exits",
    "early_wrong": "left early and wrong, %",
    "exit_shares": "left at each exit, %",
    "exit_accuracy": "  their accuracy, %",
    "anytime_accuracy": "  if all left there, %",
}


def show(heading: str, metrics: dict[str, Any], class_names: Sequence[str] = ()) -> None:
    """Prints what `metrics` holds, and the pairs of classes that are confused most."""
    print(heading)
    for key, label in _LABELS.items():
        if key in metrics:
            value = metrics[key]
            values = value if isinstance(value, list) else [value]
            samples = metrics.get("samples_by_group", {}).get(key)
            count = f"  of {samples:,} image{'s' * (samples != 1)}" if samples else ""
            print(f"  {label:41}{' / '.join(map(_percent, values))}{count}")
    for i, pair in enumerate(metrics["confusions"][:_CONFUSIONS] if class_names else ()):
        target, prediction = (class_names[pair[key]] for key in ("target", "prediction"))
        print(
            f"  {'' if i else 'confused most':41}{target} taken for {prediction}: "
            f"{pair['samples']:,}, {_percent(pair['share'])}% of {target}"
        )


def _percent(value: Any) -> str:
    return "none" if value is None else f"{100 * value:.1f}"
