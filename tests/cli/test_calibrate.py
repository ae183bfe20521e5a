"""`elf-fast calibrate`, and what `train` and `eval` do with its file."""

from __future__ import annotations

import json
import shutil

import pytest
from run_cases import printed, refused

from elf_fast.policy import Policy


@pytest.fixture
def own(run, tmp_path):
    """A copy of the run, whose policy may change."""
    return shutil.copytree(run, tmp_path / "own")


def test_training_leaves_a_policy_that_eval_applies(own, capsys):
    made = Policy.load(own / "policy.json")
    calibration = json.loads((own / "metrics.json").read_text())["calibration"]
    assert made.measured.accuracy.value == pytest.approx(calibration["accuracy"])
    assert made.measured.flops_share == pytest.approx(calibration["flops_share"])
    shown = f"thresholds {made.shown_thresholds()}, from "
    assert f"{shown}{own / 'policy.json'}" in printed(capsys, "eval", own)
    assert f"{shown}the weights" in printed(capsys, "eval", own, "--policy", "none")


def test_a_policy_is_chosen_shown_written_and_applied(own, tmp_path, capsys):
    said = printed(capsys, "calibrate", own, "--max-flops", 0.75)
    made = Policy.load(own / "policy.json")
    assert made.promise.aim == "max_flops" and made.measured.flops_share <= 0.75
    assert f"thresholds {made.shown_thresholds()}" in said and "in weights    chosen" in said
    assert "the most accurate that costs at most 0.75 of the FLOPs" in said
    left = [f"{each.share.value:.1%}" for each in made.measured.exits]
    card = (own / "README.md").read_text()
    assert "Results on validation" in card  # the card shows this policy, not that of training
    assert all(f" {share} |" in card for share in left)
    printed(capsys, "calibrate", own, "--exit-shares", 0, 0, 1)
    made = Policy.load(own / "policy.json")
    assert made.is_off
    metrics = json.loads(printed(capsys, "eval", own, "--json"))
    kept = json.loads(printed(capsys, "eval", own, "--json", "--policy", "none"))
    assert metrics["exit_shares"] == [0, 0, 1] != kept["exit_shares"]
    other = tmp_path / "other.json"
    as_json = json.loads(printed(capsys, "calibrate", own, "--max-drop", 0.2, "--guarantee", 0.5,
                                 "--per", "class", "--criterion", "auto", "--output", other,
                                 "--json"))  # fmt: skip
    assert as_json == json.loads(other.read_text()) and len(as_json["tried"]) == 3
    assert "from " + str(other) in printed(capsys, "eval", own, "--policy", other)
    assert Policy.load(own / "policy.json") == made


WRONG = [
    (("--max-flops", 0.1), "--max-flops: expected at least 0."),
    (("--max-ms", 1e-6), "--max-ms: expected at least "),
    (
        ("--max-flops", 0.9, "--max-drop", 0.1),
        "--max-drop: expected one limit alone, got max_flops",
    ),
    (("--guarantee", 0.9), "--guarantee: expected max_drop, too"),
    (
        ("--max-drop", 0.01, "--guarantee", 0.95),
        "--guarantee: expected at least 437 samples in the half that tests",
    ),
    (("--exit-shares", 0.5, 0.1), "--exit-shares: expected 3 shares"),
    (("--criterion", "luck"), "--criterion: expected one of confidence"),
    (("--batch", 4, "--max-flops", 0.7), "--batch: expected only with --max-ms, got 4"),
    (("--batch", 0, "--max-ms", 5), "--batch: expected an integer >= 1"),
    (("--device", "abacus"), "device: expected cpu"),
    (("--output", "/nowhere/p.json"), "--output: expected a file in a folder that exists"),
]


@pytest.mark.parametrize("flags, message", WRONG, ids=[w[0][0] + str(len(w[0])) for w in WRONG])
def test_a_mistake_is_one_line_and_changes_nothing(run, flags, message, capsys):
    before = (run / "policy.json").read_bytes()
    assert message in refused(capsys, "calibrate", run, *flags)
    assert (run / "policy.json").read_bytes() == before


def test_weights_that_are_not_the_runs_leave_its_policy_alone(own, tmp_path, capsys):
    before = (own / "policy.json").read_bytes()
    (step, *_) = sorted((own / "checkpoints").iterdir())
    other = shutil.copy(step / "model.safetensors", own / "old.safetensors")
    said = refused(capsys, "calibrate", other)
    assert f"--output: expected a file for the policy of {other}, got none" in said
    printed(capsys, "calibrate", other, "--output", tmp_path / "old.json")
    assert (own / "policy.json").read_bytes() == before


def test_a_run_that_is_finished_again_keeps_the_policy_before(own, folder, capsys):
    printed(capsys, "calibrate", own, "--exit-shares", 0, 0, 1)
    chosen = (own / "policy.json").read_bytes()
    said = printed(capsys, "train", "--resume", own)
    assert "policy.json is written anew; the one before is policy.previous.json" in said
    assert (own / "policy.previous.json").read_bytes() == chosen


def test_files_that_are_no_policy_of_the_run_are_refused(own, capsys):
    file = own / "policy.json"
    held = json.loads(file.read_text())
    file.write_text(json.dumps({**held, "weights_digest": "ab" * 32}))
    said = refused(capsys, "eval", own)
    assert f"{file}: policy: expected one for these weights" in said and "calibrate again" in said
    file.write_text("[")
    assert f"{file}: expected a policy in JSON" in refused(capsys, "eval", own)
    assert "expected the file of a policy, found none" in refused(
        capsys, "eval", own, "--policy", own / "none.json"
    )
    assert "RUN: expected a path without NUL" in refused(capsys, "calibrate", "a\0b")


def test_a_limit_below_the_first_exit_is_refused_before_training(folder, tmp_path, capsys):
    said = refused(capsys, "train", "--data-dir", folder, "--model", "cifar_resnet8",
                   "--transforms", "small", "--img-size", 16, "--max-flops", 0.1, "--workers", 0,
                   "--output", tmp_path / "run")  # fmt: skip
    assert "--max-flops: expected at least 0.422 (all leave at the first exit), got 0.1" in said
    assert not (tmp_path / "run").exists()
