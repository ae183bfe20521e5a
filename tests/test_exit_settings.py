"""Thresholds, temperatures and weights of the exits, from what a user gives to tensors. The same
through the constructor and by assignment: test_base.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from elf_fast import ELF, ExitHead, criteria, exit_settings, reference

CONFIDENCE = criteria.by_name("confidence")


@pytest.mark.parametrize(
    "value, kept",
    [
        (0.25, [0.25, 0.25]),
        ([0.5, math.inf], [0.5, math.inf]),
        (((0.5, 0.25, 0.0), (1.0, 0.25, math.inf)), [[0.5, 0.25, 0.0], [1.0, 0.25, math.inf]]),
        (torch.tensor([0.5, 0.25], dtype=torch.float64), [0.5, 0.25]),
    ],
    ids=["one for all", "one per exit", "one per class", "tensor"],
)
def test_thresholds_become_a_float32_tensor_of_their_own(value, kept):
    found = exit_settings.thresholds("thresholds", value, 2, CONFIDENCE, 3)
    assert found.tolist() == kept and found.dtype == torch.float32
    found.fill_(0.125)
    assert not isinstance(value, torch.Tensor) or value.tolist() == kept


@pytest.mark.parametrize("cls", [reference.ELF, ELF], ids=["reference", "elf_fast"])
@pytest.mark.parametrize(
    "weights, kept",
    [
        (torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64), (0.1, 0.2, 0.3)),
        (0.3, (0.3, 0.3, 0.3)),
        (torch.tensor(2), (2.0, 2.0, 2.0)),
    ],
    ids=["tensor", "one for all", "tensor of one"],
)
def test_exit_weights_keep_double_precision(cls, weights, kept):
    model = cls([nn.Identity()] * 3, [ExitHead(8, 5)] * 3, exit_weights=weights)
    assert model.exit_weights == kept


@pytest.mark.parametrize(
    "head, classes",
    [
        (ExitHead(8, 5), 5),
        (nn.Linear(8, 5), 5),
        (nn.Sequential(nn.Flatten(), nn.Linear(8, 5)), 5),
        (nn.Sequential(nn.Linear(8, 5), nn.Softplus()), None),
    ],
)
def test_the_number_of_classes_is_that_of_the_last_layer_if_it_says_one(head, classes):
    assert exit_settings.classes_of(nn.ModuleList([head])) == classes
    assert exit_settings.classes_of(nn.ModuleList([nn.Softplus(), head])) == classes


@pytest.mark.parametrize("value", [True, [False], torch.tensor([True]), 0.5j, torch.tensor([0.5j])])
def test_no_number_is_made_of_a_bool_or_a_complex_number(value):
    with pytest.raises(TypeError, match="^thresholds: expected a scalar, 1 values .*, got "):
        exit_settings.thresholds("thresholds", value, 1, CONFIDENCE)


def test_a_wrong_number_of_classes_is_refused_in_the_forward_pass_at_the_latest():
    known, unknown = nn.Linear(8, 5), nn.Sequential(nn.Linear(8, 5), nn.Softplus())
    with pytest.raises(ValueError, match=r"thresholds: .* or \[1, 5\], one per class"):
        ELF([nn.Identity()] * 2, [known, known], thresholds=torch.rand(1, 4))
    model = ELF([nn.Identity()] * 2, [unknown, unknown], thresholds=torch.rand(1, 4))
    with pytest.raises(ValueError, match=r"thresholds: expected \[E-1, C\] with C = 5"):
        model.eval()(torch.randn(2, 8))
