"""The results of a run, with and without validation and test parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_cases import DIGITS, QUIET

from elf_fast.runs import files
from elf_fast.training.processes import Processes
from elf_fast.training.trainer import Trainer


def trainer(output: Path, **changes) -> Trainer:
    config = replace(DIGITS, output=str(output), thresholds=(0.4,), **changes)
    return Trainer(config, Processes(torch.device("cpu")), console=QUIET)


def saved_thresholds(output: Path) -> list[float]:
    return files.load(output / "model.safetensors")[0]["thresholds"].tolist()


def test_without_validation_thresholds_stay(tmp_path):
    running = trainer(tmp_path)
    running.validation = None
    results = running.run()
    assert "calibration" not in results and "validation" not in results
    assert results["test"]["samples"] == 500
    assert saved_thresholds(tmp_path) == pytest.approx([0.4] * 2)


def test_uncalibrated_thresholds_stay_and_without_a_test_part_validation_is_the_result(tmp_path):
    running = trainer(tmp_path, calibrate=False)
    running.splits = replace(running.splits, test=None)
    results = running.run()
    assert "calibration" not in results and "test" not in results
    assert results["split"] == {"train": 287, "validation": 200, "test": None}
    assert results["validation"]["samples"] == 200
    assert saved_thresholds(tmp_path) == pytest.approx([0.4] * 2)
