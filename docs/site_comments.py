"""An extension of griffe, which reads the sources for the API reference: comments are shown.

A constant or field is explained by a comment, `logits: Tensor  # [N, C]` or `#: ...` on the lines
above, and a setting of a run by its help text. The extension makes it the docstring of the
constant, or an entry in the docstring of the class.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from griffe import Attribute, Class, Docstring, Extension

_BESIDE = re.compile(r"^[^#\"']*#:?\s*(?!\s|fmt:|noqa|type:)(.+)$")
_ABOVE = re.compile(r"^\s*#:\s?(.*)$")


class Comments(Extension):
    def on_attribute_instance(self, *, attr: Attribute, **kwargs: Any) -> None:
        if attr.parent and attr.parent.is_module and attr.lineno and not attr.docstring:
            text = _comment(attr.module.lines_collection[attr.filepath], attr.lineno)
            attr.docstring = Docstring(text, parent=attr) if text else None

    def on_class_members(self, *, node: Any, cls: Class, **kwargs: Any) -> None:
        if not isinstance(node, ast.ClassDef) or not cls.docstring:
            return
        lines = cls.module.lines_collection[cls.filepath]
        found = []
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                text = _help(field.value) or _comment(lines, field.lineno)
                if text and not field.target.id.startswith("_"):
                    found.append(f"    {field.target.id}: {text}")
        if found and "\nAttributes:\n" not in cls.docstring.value:
            cls.docstring.value += "\n".join(["\n\nAttributes:", *found])


def _help(value: ast.expr | None) -> str:
    """The help text of a field of `TrainConfig`, which is `_option(default, group, help, ...)`."""
    if not isinstance(value, ast.Call) or ast.unparse(value.func) != "_option":
        return ""
    default, _, text = (ast.unparse(argument) for argument in value.args[:3])
    return f"{ast.literal_eval(text)} (default: `{default}`)"


def _comment(lines: list[str], line: int) -> str:
    """The comment beside a line (counted from 1) or on the lines above it."""
    if beside := _BESIDE.match(lines[line - 1]):
        return beside[1]
    above: list[str] = []
    while line > 1 and (comment := _ABOVE.match(lines[line - 2])):
        above.insert(0, comment[1])
        line -= 1
    return " ".join(above)
