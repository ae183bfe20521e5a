"""The README's example runs as it stands. Its links: test_docs.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("torchvision")
README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_is_an_example():
    assert BLOCKS


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_example_runs(number, capsys):
    exec(compile(BLOCKS[number], f"README.md block {number}", "exec"), {})
