"""The average of the weights."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from run_cases import DIGITS

from elf_fast.runs import networks
from elf_fast.training.ema import Average


def test_the_average_is_that_of_the_weights_and_leaves_thresholds_alone():
    model = networks.network(replace(DIGITS, thresholds=(0.9, math.inf)), [10] * 10)
    average = Average(model, 0.75)
    name = "heads.0.classifier.weight"
    expected = model.get_parameter(name).detach().double().clone()
    statistics = torch.zeros(16, dtype=torch.float64)
    for _ in range(3):
        with torch.no_grad():
            model.get_parameter(name).normal_()
            model.stages[0].bn1.running_mean.normal_()
        model.thresholds[0] -= 0.1
        average.update(model)
        expected = 0.75 * expected + 0.25 * model.get_parameter(name).detach().double()
        statistics = 0.75 * statistics + 0.25 * model.stages[0].bn1.running_mean.double()
    torch.testing.assert_close(average.model.get_parameter(name).double(), expected)
    torch.testing.assert_close(average.model.stages[0].bn1.running_mean.double(), statistics)
    assert torch.equal(average.model.thresholds, model.thresholds)
