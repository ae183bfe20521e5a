"""Opening finished runs and files of weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
from run_cases import DIGITS, QUIET, evaluated, refused

from elf_fast.runs import files, opening
from elf_fast.runs.files import CheckpointError
from elf_fast.training.trainer import train


def surest(logits):
    """A user's criterion."""
    return logits.amax(dim=1) - logits.mean(dim=1)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """(folder, results) of a run whose criterion is a function."""
    folder = tmp_path_factory.mktemp("runs") / "scored"
    settings = replace(DIGITS, criterion=surest, thresholds=(1.5,), epochs=3, output=str(folder))
    return folder, train(settings, console=QUIET)


def test_a_criterion_of_the_users_trains_and_is_calibrated(scored):
    folder, results = scored
    assert results["settings"]["criterion"] == "callable surest"
    calibration = results["calibration"]
    assert calibration["accuracy"] >= calibration["accuracy_exits_off"]
    weights, _ = opening.read(folder)
    chosen = calibration["threshold"]
    assert chosen is not None and weights["thresholds"].tolist() == pytest.approx([chosen] * 2)
    assert results["validation"]["overall"] == pytest.approx(calibration["accuracy"])
    left = results["validation"]["exit_shares"]
    assert left[-1] < 1.0


def test_it_is_opened_again_with_the_function_alone(scored, capsys):
    folder, results = scored
    weights, metadata = opening.read(folder)
    with pytest.raises(ValueError, match="criterion: the run used 'callable surest'"):
        evaluated(folder, weights, metadata)
    part, metrics = evaluated(folder, weights, metadata, criterion=surest)
    assert (part, metrics) == ("test", results["test"])
    assert "criterion: the run used 'callable surest'" in refused(capsys, "eval", folder)


def test_pretrained_weights_are_not_loaded_to_be_replaced(scored):
    """They might have to be downloaded. This network would refuse the option."""
    folder, results = scored
    weights, metadata = opening.read(folder)
    settings = {**metadata["config"], "model_kwargs": {"pretrained": True}}
    recorded = {**metadata, "config": settings}
    _, metrics = evaluated(folder, weights, recorded, criterion=surest)
    assert metrics == results["test"]


def test_metadata_that_lack_what_a_run_writes_are_refused(scored, capsys, tmp_path):
    folder, _ = scored
    weights, metadata = opening.read(folder)
    for name, value in (("config", [1]), ("class_counts", None), ("seed", "a")):
        files.save(tmp_path / "a.safetensors", weights, {**metadata, name: value})
        said = refused(capsys, "eval", tmp_path / "a.safetensors")
        assert f"expected metadata of a run with {name}" in said


def test_a_folder_without_weights_says_what_was_expected(tmp_path):
    with pytest.raises(CheckpointError, match="expected a run with weights or checkpoints"):
        opening.read(tmp_path)
    with pytest.raises(CheckpointError, match="missing: expected a checkpoint file, found none"):
        opening.read(tmp_path / "missing")
