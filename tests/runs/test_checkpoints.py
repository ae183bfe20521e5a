"""Checkpoints of a run; tests/training/test_resume.py damages those of real runs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("safetensors")

from elf_fast.runs import checkpoints, files


class Unsafe:
    def __reduce__(self):
        return print, ("a checkpoint must not run code",)


def test_a_checkpoint_runs_no_code(tmp_path, capsys):
    path = checkpoints.save(tmp_path, 1, {"a": torch.zeros(1)}, None, {"x": Unsafe()}, {})
    with pytest.raises(files.CheckpointError, match="state.pt holds what this version cannot"):
        checkpoints.load(path)
    assert capsys.readouterr().out == ""


def test_the_newest_has_the_highest_step_whatever_the_number_of_digits(tmp_path):
    (tmp_path / "step-movie.partial").mkdir()
    (tmp_path / "step-00000007.partial").mkdir()
    for step in (99_999_998, 99_999_999, 100_000_000):
        checkpoints.save(tmp_path, step, {"a": torch.zeros(1)}, None, {}, {})
    found, refused = checkpoints.newest(tmp_path)
    assert (found.path.name, refused) == ("step-100000000", [])
    checkpoints.set_aside(tmp_path, found)
    left = ["step-100000000", "step-99999999", "step-movie.partial"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
