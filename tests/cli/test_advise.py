"""`elf-fast advise`."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import elf_fast
from elf_fast import cli
from elf_fast.policy import advise as policy_advise
from elf_fast.timing import Quartiles

FAST = ["--batch", "1", "4", "--engine", "eager", "--seconds", "0"]


@pytest.fixture
def measured(monkeypatch):
    """Sets the times: measured(exits=..., whole=..., others=...) in milliseconds per batch."""

    def set_times(exits, whole, others):
        def times(engines, batches, seconds):
            ms = {policy_advise.EXITS: exits, policy_advise.WHOLE: whole}
            return {name: Quartiles(*[ms.get(name, others)] * 3) for name in engines}

        monkeypatch.setattr(policy_advise, "_measure", times)

    return set_times


def test_advises_on_a_run(run, capsys):
    assert cli.main(["advise", str(run), "--rival", "cifar_resnet8", *FAST]) == 0
    out, err = capsys.readouterr()
    shares = elf_fast.runs.measured.exit_shares(run, elf_fast.load(run))[0]
    assert " / ".join(f"{share:.0%}" for share in shares) in out.splitlines()[0]
    assert [line.split(":")[0] for line in out.splitlines() if "batches" in line] == [
        "batches of 1", "batches of 4",
    ]  # fmt: skip
    assert out.count("images/s") == 2 * 3
    assert "cifar_resnet8 " in out


def test_says_what_is_fastest_in_json(run, measured, capsys):
    measured(exits=1.0, whole=2.0, others=3.0)
    assert cli.main(["advise", str(run), *FAST, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {verdict["use"] for verdict in found["verdicts"]} == {"the exits"}
    measured(exits=2.0, whole=1.0, others=3.0)
    assert cli.main(["advise", str(run), *FAST, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {verdict["use"] for verdict in found["verdicts"]} == {"the whole network"}


def test_compares_accuracies_of_runs(run, measured, tmp_path, capsys):
    """The rival is the same run; how accurate it is without exits comes from its policy or, without
    exits, from its metrics."""
    measured(exits=2.0, whole=3.0, others=1.0)
    rival = shutil.copytree(run, tmp_path / "rival")
    assert cli.main(["advise", str(run), "--rival", str(rival), *FAST]) == 0
    out = capsys.readouterr().out
    theirs = elf_fast.runs.measured.accuracy(rival, elf_fast.load(rival))
    ours = elf_fast.load(run).policy
    if ours is None or theirs is None:
        assert "so use it if its accuracy reaches" in out
    elif theirs >= ours.measured.accuracy.value:
        assert f"use {rival}; " in out
    else:
        assert f"less accurate ({100 * theirs:.1f}%)" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch", "0"], "--batch: expected integers of 1 to 65,536, got 0"),
        (["--batch", "4", "4"], "--batch: expected each size once, got [4, 4]"),
        (["--seconds", "-1"], "--seconds: expected 0 to 86,400, got -1.0"),
        (["--device", "tpu"], "--device: expected"),
        (["--rival", "resnet_of_nobody"], "--rival: expected a network of timm or torchvision"),
        (["--rival", "a\0b"], "--rival: expected a path without NUL characters"),
    ],
)
def test_refuses(run, flags, message, capsys):
    assert cli.main(["advise", str(run), *FAST, *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("elf-fast: ")
    assert message in err
    assert err.count("\n") == 1


def test_refuses_what_it_cannot_time(run, tmp_path, capsys):
    model = elf_fast.load(run)
    names = list(model.class_names)
    torch.manual_seed(0)
    whole = elf_fast.ELF(
        [torch.nn.Sequential(*model.stages, model.heads[-1])], [torch.nn.Identity()]
    )
    assert cli.main(["advise", str(tmp_path / "none"), *FAST]) == 2
    assert "expected a folder or a file of weights, found none" in capsys.readouterr().err
    elf_fast.save(whole, tmp_path / "whole", class_names=names, backbone=None)
    assert cli.main(["advise", str(tmp_path / "whole"), *FAST]) == 2
    assert "load" in capsys.readouterr().err


def test_refuses_a_run_of_other_classes(run, tmp_path, capsys):
    other = elf_fast.load(run)
    other.class_names = ("a", "b", "c")
    elf_fast.save(other, tmp_path / "other")
    assert cli.main(["advise", str(run), "--rival", str(tmp_path / "other"), *FAST]) == 2
    err = capsys.readouterr().err
    assert f"--rival: expected a run with the same classes, got {tmp_path / 'other'}" in err


def test_needs_shares(run, tmp_path, capsys):
    other = elf_fast.load(run)
    elf_fast.save(other, tmp_path / "other", policy=None)
    (tmp_path / "other" / "policy.json").unlink(missing_ok=True)
    assert cli.main(["advise", str(tmp_path / "other"), *FAST]) == 2
    assert "run elf-fast calibrate first" in capsys.readouterr().err
