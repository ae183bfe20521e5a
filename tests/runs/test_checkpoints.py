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
