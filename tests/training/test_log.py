"""What a run logs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from run_cases import DIGITS, QUIET

from elf_fast.training.trainer import train


def test_tensorboard_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    results = train(replace(DIGITS, output=str(tmp_path), log_tensorboard=True), console=QUIET)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (record,) = results["history"]
    for name in ("loss", "accuracy", "lr", "exit_shares/0", "validation/overall"):
        (event,) = events.Scalars(name)
        value = record
        for key in name.split("/"):
            value = value[int(key)] if key.isdigit() else value[key]
        assert event.step == record["step"] and event.value == pytest.approx(value)
