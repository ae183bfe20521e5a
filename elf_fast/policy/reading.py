"""Reads the fields of a JSON object, each with its type and range."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from .. import checks

Triple = tuple[float, float, float]


class PolicyError(ValueError):
    """A policy that cannot be used. The message names the field, and the file if there is one."""


class Reader:
    """One JSON object. Every method returns the field `name` or raises a PolicyError that names it
    as a dotted path. With none=True a missing field and null give None.

    Args:
        path: the dotted name of the object; "" for the outermost.
    """

    def __init__(self, path: str, held: Any) -> None:
        self.path = path
        if not isinstance(held, dict):
            raise PolicyError(f"{path or 'policy'}: expected names with values, got {_shown(held)}")
        self.held = held

    def get(self, name: str) -> Any:
        return self.held.get(name)

    def _wrong(self, name: str, expected: str) -> PolicyError:
        where = f"{self.path}.{name}" if self.path else name
        got = "none" if name not in self.held else _shown(self.held[name])
        return PolicyError(f"{where}: expected {expected}, got {got}")

    def _read(self, name: str, none: bool, fits: Callable[[Any], bool], expected: str) -> Any:
        value = self.held.get(name)
        if (value is None and none) or fits(value):
            return value
        raise self._wrong(name, expected)

    def text(self, name: str, *, none: bool = False) -> Any:
        return self._read(name, none, lambda v: isinstance(v, str), "text")

    def digest(self, name: str, *, none: bool = False) -> Any:
        def fits(value: Any) -> bool:
            return isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{16,64}", value))

        return self._read(name, none, fits, "16 to 64 hexadecimal digits")

    def number(self, name: str, *, none: bool = False, low: float = 0.0) -> Any:
        bound = f" of at least {low:g}" if math.isfinite(low) else ""
        return self._read(name, none, lambda v: _is_number(v) and v >= low, f"a number{bound}")

    def share(self, name: str, *, none: bool = False) -> Any:
        return self._read(name, none, _is_share, "a number in [0, 1]")

    def count(self, name: str, *, none: bool = False) -> Any:
        def fits(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and value >= 1

        return self._read(name, none, fits, "an integer of at least 1")

    def estimate(self, name: str, *, none: bool = False) -> Any:
        """(value, low, high)."""
        expected = "a share and its interval, [value, low, high]"
        found = self._read(name, none, _is_estimate, expected)
        return None if found is None else tuple(found)

    def estimates(self, name: str) -> list[Triple]:
        def fits(value: Any) -> bool:
            return isinstance(value, list) and all(map(_is_estimate, value))

        found = self._read(name, False, fits, "a list of shares, each [value, low, high]")
        return [tuple(triple) for triple in found]

    def numbers(self, name: str) -> tuple[float, ...]:
        def fits(value: Any) -> bool:
            return isinstance(value, list) and all(map(_is_number, value))

        return tuple(map(float, self._read(name, False, fits, "a list of numbers")))

    def thresholds(self, name: str, off: float) -> Any:
        """[E-1] or [E-1, C]; null stands for `off`."""

        def is_row(value: Any) -> bool:
            return isinstance(value, list) and all(v is None or _is_number(v) for v in value)

        def fits(value: Any) -> bool:
            return is_row(value) or (isinstance(value, list) and all(map(is_row, value)))

        def row(values: list[Any]) -> tuple[float, ...]:
            return tuple(off if v is None else float(v) for v in values)

        found = self._read(name, False, fits, "a list of numbers or nulls, or a list of such lists")
        return row(found) if is_row(found) else tuple(map(row, found))

    def inner(self, name: str) -> Reader:
        return Reader(f"{self.path}.{name}" if self.path else name, self.held.get(name))

    def inners(self, name: str) -> list[Reader]:
        found = self._read(name, False, lambda v: isinstance(v, list), "a list")
        return [Reader(f"{self.path}.{name}[{i}]", value) for i, value in enumerate(found)]

    def named(self, name: str) -> dict[str, Reader]:
        inside = self.inner(name)
        return {key: inside.inner(key) for key in inside.held}


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) < 1e38 and math.isfinite(value)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_estimate(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(map(_is_share, value))
        and value[1] <= value[0] <= value[2]
    )


def _shown(value: Any) -> str:
    return checks.describe(value)
