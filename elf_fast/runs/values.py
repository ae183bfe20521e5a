"""Converts plain values from YAML or the command line to the values of settings."""

from __future__ import annotations

import contextlib
import os
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin

from .. import checks


def without_none(hint: Any) -> Any:
    """The annotation `hint` without its None."""
    if get_origin(hint) in (Union, types.UnionType):
        arms = tuple(arm for arm in get_args(hint) if arm is not type(None))
        return arms[0] if len(arms) == 1 else Union[arms]  # noqa: UP007
    return hint


def convert(name: str, value: Any, hint: Any) -> Any:
    """`value` of the setting `name` as the annotation `hint` asks for it. Numbers may be strings.

    Raises:
        ValueError, TypeError: it does not fit.
    """
    inner = without_none(hint)
    if value is None and type(None) in get_args(hint):
        return None
    origin, arguments = get_origin(inner), get_args(inner)
    if origin is Literal:
        if value in arguments:
            return value
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
        items = value if isinstance(value, (list, tuple)) else [value]
        return dict(value if isinstance(value, dict) else (_key_value(name, i) for i in items))
    if inner is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    is_bool = isinstance(value, bool)
    if isinstance(value, inner) and is_bool == (inner is bool):
        return inner(value)  # a float of numpy's is a float, but YAML does not know it
    if (inner is float and isinstance(value, int) and not is_bool) or (
        inner in (int, float) and isinstance(value, str)
    ):
        with contextlib.suppress(ValueError):
            return inner(value)
    expected = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}[inner]
    raise TypeError(f"{name}: expected {expected}, got {checks.describe(value)}")


def _key_value(name: str, item: Any) -> tuple[str, Any]:
    import yaml

    key, equals, value = str(item).partition("=")
    if not equals:
        raise ValueError(f"{name}: expected KEY=VALUE, got {item!r}")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: expected KEY=VALUE with a YAML value, got {item!r}") from error
