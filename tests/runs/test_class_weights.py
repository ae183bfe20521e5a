"""Files with weights of classes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from run_cases import DIGITS

from elf_fast.runs import class_weights
from elf_fast.runs.networks import exit_loss

NAMES = ["cat", "dog, small", "owl"]


@pytest.mark.parametrize(
    "text",
    [
        "1\n2.5\n\n3\n",
        'owl,3\ncat,1\n"dog, small",2.5\n',
        '\ufeffclass,weight\ncat, 1\n"dog, small", 2.5\nowl, 3',
    ],
)
def test_weights_are_read_in_the_order_of_the_classes(text, tmp_path):
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    assert class_weights.read(str(tmp_path / "a.csv"), NAMES).tolist() == [1.0, 2.5, 3.0]


@pytest.mark.parametrize(
    "text, message",
    [
        ("1\n2\n", "expected 3 lines in .*a.csv, one per class, got 2"),
        ("", "expected every class of the data in .*, got it without 'cat', 'dog, small', 'owl'"),
        ("cat,1\nowl,2\n", "got it without 'dog, small'"),
        ('cat,1\nowl,2\n"dog, small",1\nelk,1\n', "only classes of the data .* with 'elk'"),
        ("cat,1\ncat,1\n", "expected every class once in .*, got 'cat' again"),
        ("1\n0\n1\n", "positive finite weight in every line of .*a.csv, got 'dog, small,0'"),
        ("1\nnan\n1\n", "got 'dog, small,nan'"),
        ("cat,inf\n", "got 'cat,inf'"),
        ("cat,1,2\n", "got 'cat,1,2'"),
        ("cat,1\nowl\n", "got 'owl'"),
    ],
)  # fmt: skip
def test_other_files_are_refused(text, message, tmp_path):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=f"^class_weights: .*{message}"):
        class_weights.read(str(tmp_path / "a.csv"), NAMES)


def test_files_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "a.csv", tmp_path / "none", tmp_path):
        with pytest.raises(ValueError, match="^class_weights: expected a text file, got "):
            class_weights.read(str(path), NAMES)


@pytest.mark.parametrize("name", ["cross_entropy", "focal", "ldam", "balanced_softmax"])
def test_every_loss_is_weighted(name):
    config = replace(DIGITS, loss=name, class_weights="a.csv", drw_epoch=None)
    weights = torch.tensor([1.0, 2.0, 4.0])
    z, y = torch.randn(3, 3), torch.arange(3)
    losses = [exit_loss(config, [9, 5, 2], w) for w in (weights, None)]
    for loss in losses:
        loss.reduction = "none"
    weighted, plain = (loss(z, y) for loss in losses)
    assert torch.allclose(weighted, weights * plain)


def test_deferred_weights_multiply_them():
    config = replace(DIGITS, class_weights="a.csv", epochs=2, drw_epoch=1)
    loss = exit_loss(config, [9, 5, 2], torch.tensor([1.0, 2.0, 4.0]))
    assert loss.weight.tolist() == [1.0, 2.0, 4.0]
    loss.set_epoch(1)
    assert (loss.weight / torch.tensor([1.0, 2.0, 4.0])).diff().min() > 0
