"""The flags of `elf-fast train`: one for every setting of `TrainConfig`."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, Literal, get_args, get_origin

from ..runs.config import HINTS, TrainConfig
from ..runs.values import NONE, without_none

#: Settings whose flags for true and false are not --name and --no-name.
_SWITCHES = {"drop_exited": ("--drop-exited", "--keep-exited")}
_METAVAR = {int: "N", float: "X", str: "NAME"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every setting. A flag that is not given sets nothing in the namespace."""
    groups: dict[str, Any] = {}
    for option in dataclasses.fields(TrainConfig):
        title = option.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add_flag(groups[title], option, HINTS[option.name])
    groups["exits"].add_argument(
        "--no-exits", dest="exits", action="store_const", const=(), default=argparse.SUPPRESS,
        help="train the network without exits, all else equal",
    )  # fmt: skip


def from_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given as flags."""
    return {name: value for name, value in vars(arguments).items() if name in HINTS}


def group_of(name: str) -> str:
    """The group of a setting in --help."""
    return TrainConfig.__dataclass_fields__[name].metadata["group"]


def _add_flag(group: Any, option: dataclasses.Field, hint: Any) -> None:
    flag = "--" + option.name.replace("_", "-")
    hint, may_be_none = without_none(hint), type(None) in get_args(hint)
    common: dict[str, Any] = {"dest": option.name, "default": argparse.SUPPRESS}
    text = option.metadata["help"].replace("%", "%%")
    if hint is bool:
        yes, no = _SWITCHES.get(option.name, (flag, "--no-" + flag[2:]))
        if option.default is not None:
            text += f" (default: {yes if option.default else no})"
        nargs = "?" if may_be_none else 0
        group.add_argument(yes, no, action=_Switch, nargs=nargs, metavar=NONE, help=text, **common)
        return
    shown = _spell(option.default)
    text += f" (default: {shown})" if shown else ""
    origin = get_origin(hint)
    choices = get_args(hint) if origin is Literal else option.metadata.get("choices")
    if choices is not None:
        choices = (*choices, NONE) if may_be_none else tuple(choices)
        group.add_argument(flag, choices=choices, help=text, **common)
    elif origin in (tuple, dict):
        metavar = "KEY=VALUE" if origin is dict else _METAVAR.get(get_args(hint)[0], "X")
        group.add_argument(flag, nargs="+", metavar=metavar, help=text, **common)
    else:
        common["metavar"] = option.metadata.get("metavar", _METAVAR[hint])
        if "const" in option.metadata:
            common |= {"nargs": "?", "const": option.metadata["const"]}
        group.add_argument(flag, help=text, **common)


class _Switch(argparse.Action):
    """Two flags, the first for true and the second for false. Either takes `none`, if anything."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        if values not in (None, [], NONE):
            raise argparse.ArgumentError(self, f"expected {NONE} or nothing, got {values!r}")
        value = None if values == NONE else option_string == self.option_strings[0]
        setattr(namespace, self.dest, value)


def _spell(default: Any) -> str:
    if default is None or default is dataclasses.MISSING:
        return ""
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
