"""Classes grouped by their number of training samples."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import checks

__all__ = ["FEW_BELOW", "GROUPS", "MANY_ABOVE", "class_groups"]

MANY_ABOVE = 100  # training samples; the usual long-tail groups (Liu et al., arXiv 1904.05160)
FEW_BELOW = 20
GROUPS = ("many", "medium", "few")


def class_groups(class_counts: Sequence[int] | Tensor) -> dict[str, list[int]]:
    """Classes by number of training samples: many (> 100), medium (20 to 100) and few (< 20)."""
    groups: dict[str, list[int]] = {name: [] for name in GROUPS}
    for c, n in enumerate(checks.class_counts(class_counts, least=0).tolist()):
        groups["many" if n > MANY_ABOVE else "few" if n < FEW_BELOW else "medium"].append(c)
    return groups
