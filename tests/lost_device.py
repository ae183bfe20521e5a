"""What a test run does when a test makes the CUDA device unusable."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_runtest_logfinish() -> None:
    """After an invalid access or an assertion in a kernel, every CUDA call of the process fails.
    The process ends then, so that later tests do not fail for it. pytest-xdist starts another
    worker; without it the run ends."""
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit(f"the CUDA device is lost: {error}", returncode=1)
