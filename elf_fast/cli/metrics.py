"""Prints the main metrics of an evaluation."""

from __future__ import annotations

from typing import Any


def show(heading: str, metrics: dict[str, Any]) -> None:
    from ..metrics import FEW_BELOW, MANY_ABOVE  # here: torchmetrics imports matplotlib

    labels = {
        "overall": "accuracy overall, %",
        "many": f"accuracy many (> {MANY_ABOVE} training images), %",
        "medium": f"accuracy medium ({FEW_BELOW} to {MANY_ABOVE}), %",
        "few": f"accuracy few (< {FEW_BELOW}), %",
        "flops_share": "FLOPs, % of without exits",
    }
    print(heading)
    for key, label in labels.items():
        print(f"  {label:42}{_percent(metrics[key])}")
    shares = " / ".join(_percent(share) for share in metrics["exit_shares"])
    print(f"  {'left at each exit, %':42}{shares}")


def _percent(value: Any) -> str:
    return "none" if value is None else f"{100 * value:.1f}"
