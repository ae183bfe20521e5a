"""The target prior of `elf-fast eval --test-prior`."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from .errors import UserError, check_path

FLAG = "--test-prior"
_SHOWN = 5  # classes that a message names


def read(given: str, class_names: Sequence[str], class_counts: Sequence[int]) -> list[float]:
    """[C] weights of the classes.

    Args:
        given: "uniform", "training" (the shares of the training images), or a file of lines
            "class,weight", which names every class once.

    Raises:
        UserError: the file is missing or malformed.
    """
    if given == "uniform":
        return [1.0] * len(class_names)
    if given == "training":
        return [float(n) for n in class_counts]
    check_path(FLAG, given)
    if not Path(given).is_file():
        raise UserError(
            f"{FLAG}: expected uniform, training or a file of lines class,weight, got {given!r}"
        )
    try:
        with open(given, encoding="utf-8-sig", newline="") as file:
            rows = [(reader.line_num, row) for reader in [csv.reader(file)] for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{FLAG}: {given}: expected text in UTF-8 ({error})") from error
    return _weights(given, rows, class_names)


def _weights(
    path: str, rows: Sequence[tuple[int, list[str]]], class_names: Sequence[str]
) -> list[float]:
    index = {name: c for c, name in enumerate(class_names)}
    weights: dict[int, float] = {}
    for number, row in rows:
        if not row or (number == 1 and row == ["class", "weight"]):
            continue
        where = f"{FLAG}: {path}, line {number}"
        if len(row) != 2:
            raise UserError(f"{where}: expected class,weight, got {','.join(row)!r}")
        name = row[0].strip()
        if name not in index:
            raise UserError(f"{where}: expected a class of the run, got {name!r}")
        if index[name] in weights:
            raise UserError(f"{where}: expected every class once, got {name!r} again")
        try:
            weight = float(row[1])
        except ValueError:
            weight = math.nan
        if not 0 <= weight < math.inf:
            raise UserError(f"{where}: expected a finite weight of at least 0, got {row[1]!r}")
        weights[index[name]] = weight
    missing = [name for name, c in index.items() if c not in weights]
    if missing:
        more = f" and {len(missing) - _SHOWN:,} more" if len(missing) > _SHOWN else ""
        raise UserError(
            f"{FLAG}: {path}: expected a weight for each of the {len(index):,} classes, got none "
            f"for {', '.join(missing[:_SHOWN])}{more}"
        )
    if not any(weights.values()):
        raise UserError(f"{FLAG}: {path}: expected a weight above 0, got 0 for all classes")
    return [weights[c] for c in range(len(class_names))]
