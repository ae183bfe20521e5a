"""Reads YAML that a person wrote: plain values only, every key once, in bounded time and memory."""

from __future__ import annotations

import re
from typing import Any

#: Bytes of a text; at worst some ten seconds pass for each 2**20 of them. Settings with a threshold
#: of 16 digits for each of 20,000 classes at three exits take a third of it.
LARGEST = 2**22


def parse(text: str | bytes, largest: float = LARGEST) -> Any:
    """The value that `text` holds.

    Aliases (`*name`) are refused, because a few lines of them may stand for gigabytes. A key that
    is given twice is refused, because YAML would silently take the last one, and so are merge keys
    (`<<`), which may give it twice. Integers with leading zeros and numbers with colons are
    refused, because YAML 1.1 reads 0100 as 64 and 1:30 as 90.

    Raises:
        ValueError: it is no YAML, is larger than `largest`, or holds one of these.
    """
    import yaml

    if len(text) > largest:
        raise ValueError(f"expected YAML of at most {largest:,} bytes, got more")
    try:
        return yaml.load(text, _loader())
    # Beside its own errors PyYAML raises those of its conversions, as for the date 2020-99-99.
    except (
        yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, OverflowError,
    ) as error:  # fmt: skip
        raise ValueError(f"expected YAML: {error}") from error
    except RecursionError:
        raise ValueError("expected YAML, got lists or tables nested too deeply") from None


def _loader() -> type:
    """PyYAML's safe loader without what `parse` refuses."""
    import yaml

    def refused(text: str, at: Any) -> Exception:
        return yaml.MarkedYAMLError(problem=text, problem_mark=at.start_mark)

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                event = self.peek_event()
                raise refused(f"expected no aliases, got *{event.anchor}", event)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                if key.tag == "tag:yaml.org,2002:merge":
                    raise refused("expected no merge keys, got <<", key)
                if (key.tag, str(key.value)) in seen:
                    raise refused(f"expected every key once, got {key.value} again", key)
                seen.add((key.tag, str(key.value)))
            return super().construct_mapping(node, deep)

        def construct_scalar(self, node: Any) -> Any:
            is_number = node.tag.endswith((":int", ":float"))
            if is_number and re.search(r":|^[-+]?0[0-9_]+$", node.value):
                raise refused(
                    f"expected a number without colons and leading zeros, got {node.value}", node
                )
            return super().construct_scalar(node)

    return Loader
