"""An extension of griffe, which reads the sources for the API reference: comments on fields.

The fields of results are explained by comments, `logits: Tensor  # [N, C]` or `#: ...` on the lines
above. The extension makes such a comment the field's docstring.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from griffe import Attribute, Docstring, Extension

_BESIDE = re.compile(r"^[^#\"']*#:?\s*(?!fmt:|noqa|type:)(.+)$")
_ABOVE = re.compile(r"^\s*#:\s?(.*)$")


class FieldComments(Extension):
    def on_attribute_instance(self, *, node: Any, attr: Attribute, **kwargs: Any) -> None:
        if attr.docstring or not isinstance(node, ast.AnnAssign) or not attr.lineno:
            return
        lines = attr.module.lines_collection[attr.filepath]
        beside = _BESIDE.match(lines[attr.lineno - 1])
        comment = [beside[1]] if beside else []
        at = attr.lineno - 2
        while not beside and at >= 0 and (above := _ABOVE.match(lines[at])):
            comment.insert(0, above[1])
            at -= 1
        if comment:
            attr.docstring = Docstring("\n".join(comment), parent=attr)
