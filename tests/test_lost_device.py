"""What a run does when a test makes the CUDA device unusable."""

from __future__ import annotations

import lost_device
import pytest
import torch


def test_a_run_ends_where_the_device_is_lost(monkeypatch):
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with monkeypatch.context() as broken:
        broken.setattr(torch.cuda, "synchronize", lost)
        with pytest.raises(pytest.exit.Exception, match="the CUDA device is lost: CUDA error"):
            lost_device.pytest_runtest_logfinish()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    lost_device.pytest_runtest_logfinish()
