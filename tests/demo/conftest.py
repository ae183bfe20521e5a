"""What the tests of this folder share."""

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread) -> None:
    """For every test of this folder."""
