"""Lines on the screen."""

from __future__ import annotations

import io

import pytest

pytest.importorskip("rich")

from rich.console import Console

from elf_fast.console import say


@pytest.mark.parametrize(
    "text, shown",
    [
        ("m[/b]", "m[/b]"),
        ("[b]ex[lr=0.1] :smile: 12", "[b]ex[lr=0.1] :smile: 12"),
        ("été 图", "été 图"),
        ("a\nb\x1b[2J\udcff", "a\\nb\\x1b[2J\\udcff"),
        ("x" * 300, "x" * 300),
    ],
)
def test_a_line_is_shown_as_it_is(text, shown):
    file = io.StringIO()
    say(Console(file=file, force_terminal=True, width=80), text)
    assert file.getvalue() == shown + "\n"
