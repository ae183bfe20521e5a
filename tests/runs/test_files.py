"""Files of weights: complete, or an error."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("safetensors")

from elf_fast.runs import files


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3), "t": torch.tensor([math.inf])}
    files.save(path, state, {"class_counts": [3, 1], "name": "π"})
    return path, state


def test_a_checkpoint_comes_back_as_it_was(saved):
    path, state = saved
    loaded, metadata = files.load(path)
    assert metadata == {"class_counts": [3, 1], "name": "π"}
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[k], state[k]) and loaded[k].dtype == state[k].dtype
               for k in state)  # fmt: skip
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_saving_again_keeps_the_previous_checkpoint(saved):
    path, _ = saved
    before = path.read_bytes()
    files.save(path, {"a": torch.zeros(1)}, {})
    assert files.previous(path).read_bytes() == before
    assert files.load(path)[0]["a"].tolist() == [0.0]
    assert len(list(path.parent.iterdir())) == 2


def test_a_failed_save_leaves_the_checkpoint_alone(saved, monkeypatch):
    path, _ = saved
    before = path.read_bytes()
    monkeypatch.setattr(files.os, "fsync", _no_space)
    with pytest.raises(OSError, match="No space") as error:
        files.save(path, {"a": torch.zeros(1)}, {})
    assert error.value.filename == str(path)
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*.partial"))


def _no_space(descriptor):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_a_truncated_checkpoint_is_refused(saved, keep):
    path, _ = saved
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(files.CheckpointError, match="cut short, damaged"):
        files.load(path)


def test_a_changed_weight_is_refused(saved):
    path, _ = saved
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(files.CheckpointError, match=r"model\.safetensors: .*checksum differs"):
        files.load(path)


def test_changed_metadata_is_refused(saved):
    path, _ = saved
    path.write_bytes(path.read_bytes().replace(b"[3, 1]", b"[3, 2]"))
    with pytest.raises(files.CheckpointError, match="checksum differs"):
        files.load(path)


def test_files_of_other_makers_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(files.CheckpointError, match="only checkpoints that elf-fast wrote"):
        files.load(tmp_path / "other.safetensors")
    with pytest.raises(files.CheckpointError, match="found none"):
        files.load(tmp_path / "missing.safetensors")
