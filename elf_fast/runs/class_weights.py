"""Weights of the classes in the loss, from a file of the user's."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


def read(path: str, class_names: Sequence[str]) -> Tensor:
    """[C] float32 from a text file: lines "class,weight" in any order, as CSV with or without a
    header, or one weight a line in the order of the classes. Empty lines count for nothing.

    Raises:
        ValueError: the file cannot be read, a class is missing, unknown or named twice, or a weight
            is no positive finite number.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"class_weights: expected a text file, got {path} ({error})") from error
    rows = [row for row in rows if any(row)]
    if rows and all(len(row) == 1 for row in rows):
        if len(rows) != len(class_names):
            raise ValueError(
                f"class_weights: expected {len(class_names)} lines in {path}, one per class, got "
                f"{len(rows)}"
            )
        rows = [[name, *row] for name, row in zip(class_names, rows, strict=True)]
    elif rows and len(rows[0]) == 2 and _number(rows[0][1]) is None:
        rows = rows[1:]  # the header
    found: dict[str, float] = {}
    for row in rows:
        weight = _number(row[1]) if len(row) == 2 else None
        if weight is None or not 0 < weight < math.inf:
            raise ValueError(
                "class_weights: expected class,weight with a positive finite weight in every line "
                f"of {path}, got {','.join(row)!r}"
            )
        if row[0] in found:
            raise ValueError(f"class_weights: expected every class once in {path}, got {row[0]!r} "
                             "again")  # fmt: skip
        found[row[0]] = weight
    for what, names in (
        ("every class of the data", [name for name in class_names if name not in found]),
        ("only classes of the data", [name for name in found if name not in set(class_names)]),
    ):
        if names:
            problem = "without" if what.startswith("every") else "with"
            raise ValueError(
                f"class_weights: expected {what} in {path}, got it {problem} "
                f"{', '.join(map(repr, names[:5]))}{' and more' if len(names) > 5 else ''}"
            )
    return torch.tensor([found[name] for name in class_names])


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
