"""Prints the main metrics of an evaluation."""

from __future__ import annotations

from typing import Any


def show(heading: str, metrics: dict[str, Any]) -> None:
    print(heading)
    for key in ("overall", "many", "medium", "few", "flops_share"):
        label = "FLOPs, % of without exits" if key == "flops_share" else f"accuracy {key}, %"
        print(f"  {label:26}{_percent(metrics[key])}")
    shares = " / ".join(_percent(share) for share in metrics["exit_shares"])
    print(f"  {'left at each exit, %':26}{shares}")


def _percent(value: Any) -> str:
    return "none" if value is None else f"{100 * value:.1f}"
