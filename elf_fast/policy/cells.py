"""Which classes share a threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .. import checks
from .exit_table import ExitTable

#: Classes that an exit predicts for fewer samples share one threshold there: it would be chosen
#: from too little.
LEAST = 20


def cells_of(
    table: ExitTable, per: str, groups: Mapping[str, Sequence[int]], classes: int
) -> Tensor | None:
    """[E-1, C] the cell of each predicted class, 0..K-1 at each exit, or None: all share one.

    Args:
        per: "exit", "class" or "group".
        classes: C.
        groups: classes by name, for "group"; classes in none of them share a threshold.

    Raises:
        ValueError: a class in two groups, or one that is no class.
    """
    if per == "exit":
        return None
    wanted = torch.arange(classes, device="cpu") if per == "class" else _by_group(groups, classes)
    rows = []
    for prediction in table.prediction[:-1]:
        predicted = torch.bincount(wanted[prediction], minlength=int(wanted.max()) + 1)
        rare = predicted < LEAST
        # The rare ones together are cell 0; without any the others begin at 0.
        number = torch.where(rare, 0, (~rare).cumsum(0) - (0 if bool(rare.any()) else 1))
        rows.append(number[wanted])
    return torch.stack(rows)


def _by_group(groups: Mapping[str, Sequence[int]], C: int) -> Tensor:
    """[C] the number of the group of each class; those in none have the last."""
    found = torch.full((C,), len(groups), device="cpu")
    for number, (name, classes) in enumerate(groups.items()):
        for c in classes:
            checks.integer(f"groups[{name!r}]", c, 0, C - 1)
            if found[c] != len(groups):
                raise ValueError(f"groups: expected every class in one group, got {c} in two")
            found[c] = number
    return found
