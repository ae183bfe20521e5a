"""Converts plain values from YAML or the command line to the values of settings."""

from __future__ import annotations

import contextlib
import math
import os
import types
from collections.abc import Callable, Iterator
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np

from .. import checks
from . import strict_yaml

#: How flags and files take an optional setting back.
NONE = "none"


def without_none(hint: Any) -> Any:
    """The annotation `hint` without its None."""
    if get_origin(hint) in (Union, types.UnionType):
        arms = tuple(arm for arm in get_args(hint) if arm is not type(None))
        return arms[0] if len(arms) == 1 else Union[arms]  # noqa: UP007
    return hint


@contextlib.contextmanager
def renamed(**settings: str) -> Iterator[None]:
    """Errors inside that begin with the name of an argument begin with that of its setting:
    `renamed(root="data_dir")` turns `root: expected ...` into `data_dir: expected ...`."""
    try:
        yield
    except (TypeError, ValueError) as error:
        name, colon, rest = str(error).partition(":")
        if not colon or name not in settings:
            raise
        raise type(error)(f"{settings[name]}:{rest}") from error


def convert(name: str, value: Any, hint: Any) -> Any:
    """`value` of the setting `name` as the annotation `hint` asks for it. Numbers may be strings,
    and values may be NumPy's. Where the annotation has None, "none" is None, so that a flag takes
    back what a file or a resumed run has set. The result holds only what YAML can hold, except
    callables.

    Raises:
        ValueError, TypeError: it does not fit.
    """
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    inner = without_none(hint)
    if type(None) in get_args(hint) and (value is None or value in (NONE, [NONE], (NONE,))):
        return None
    origin, arguments = get_origin(inner), get_args(inner)
    if origin is Literal:
        if isinstance(value, str) and value in arguments:
            return arguments[arguments.index(value)]  # not an enum's member of the same text
        raise ValueError(f"{name}: expected one of {', '.join(arguments)}, got {value!r}")
    if origin in (Union, types.UnionType):  # one value, or the last arm
        if get_origin(arguments[-1]) is Callable:
            return value if callable(value) else convert(name, value, arguments[0])
        if isinstance(value, str) and "," in value:
            value = value.split(",")
        several = isinstance(value, (list, tuple))
        return convert(name, value, arguments[-1] if several else arguments[0])
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(convert(name, item, arguments[0]) for item in items)
    if origin is dict:
        return _table(name, value)
    return _text(name, value) if inner is str else _number(name, value, inner)


def _text(name: str, value: Any) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a text, got {checks.describe(value)}")
    if not value:
        raise ValueError(f"{name}: expected a text of at least one character, got ''")
    if "\0" in value or not _is_utf8(value):
        raise ValueError(f"{name}: expected UTF-8 text without NUL characters, got {value!r}")
    return str.__str__(value)  # not an enum's member


def _is_utf8(value: str) -> bool:
    """Whether UTF-8 can hold the text. Python reads other bytes in names of files as surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _number(name: str, value: Any, kind: type) -> Any:
    """A bool, int or float."""
    number = value
    readable: Any = {bool: (), int: str, float: (str, int)}[kind]
    if isinstance(value, readable) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            number = kind(value)
    if isinstance(number, int) and number.bit_length() > 64:  # too long to print, perhaps
        raise ValueError(
            f"{name}: expected a number of at most 64 bits, got one of {number.bit_length()}"
        )
    if isinstance(number, kind) and isinstance(number, bool) == (kind is bool):
        return kind(number)
    expected = {bool: "true or false", int: "an integer", float: "a number"}[kind]
    raise TypeError(f"{name}: expected {expected}, got {checks.describe(value)}")


def _table(name: str, value: Any) -> dict[str, Any]:
    """A table from a dict or from texts KEY=VALUE."""
    if isinstance(value, dict):
        return {_key(name, key): _plain(f"{name}.{key}", item) for key, item in value.items()}
    items = value if isinstance(value, (list, tuple)) else [value]
    found: dict[str, Any] = {}
    for key, item in (_key_value(name, item) for item in items):
        if key in found:
            raise ValueError(f"{name}: expected every key once, got {key!r} again")
        found[key] = _plain(f"{name}.{key}", item)
    return found


def _key(name: str, key: Any) -> str:
    return _text(f"{name}: a key", key)


def _plain(name: str, value: Any, depth: int = 0) -> Any:
    """A value in a table, as YAML and strict JSON hold it: tuples become lists."""
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if depth > 10:
        raise ValueError(f"{name}: expected at most 10 lists and tables in each other, got more")
    if isinstance(value, (list, tuple)):
        return [_plain(name, item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {_key(name, key): _plain(name, item, depth + 1) for key, item in value.items()}
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return _number(name, value, int)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, str) and "\0" not in value and _is_utf8(value):
        return str.__str__(value)
    raise ValueError(
        f"{name}: expected finite numbers, texts, true, false, none, or lists and tables of them, "
        f"got {checks.describe(value)}"
    )


def _key_value(name: str, item: Any) -> tuple[str, Any]:
    key, equals, value = str(item).partition("=")
    if not (equals and key):
        raise ValueError(f"{name}: expected KEY=VALUE, got {item!r}")
    try:
        return key, strict_yaml.parse(value)
    except ValueError as error:
        raise ValueError(f"{name}: expected KEY=VALUE with a YAML value, got {item!r}") from error
