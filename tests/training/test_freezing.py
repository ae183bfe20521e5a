"""Frozen parts of a network, and learning rates by depth."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from run_cases import DIGITS
from torch import nn

from elf_fast.backbones import depths
from elf_fast.modules import ELF
from elf_fast.runs.freezing import train_mode
from elf_fast.runs.networks import backbone_name, network
from elf_fast.training.learner import Learner
from elf_fast.training.processes import Processes
from elf_fast.training.schedule import layer_scales

CPU = Processes(torch.device("cpu"))
ADAMW = replace(DIGITS, opt="adamw", weight_decay=0.1)


def trained(model: ELF) -> set[str]:
    """The modules of the backbone with parameters that train."""
    return {
        backbone_name(name).rpartition(".")[0].partition(".")[0]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and backbone_name(name)
    }


@pytest.mark.parametrize("exits", [None, ()], ids=["exits", "plain"])
@pytest.mark.parametrize(
    "until, left",
    [
        ("layer1", {"layer2", "layer3", "fc"}),
        ("layer2.0.conv1", {"layer2", "layer3", "fc"}),
        ("layer3", {"fc"}),
        ("fc", {"fc"}),  # the classifier always trains
        ("all", {"fc"}),
    ],
)
def test_parameters_up_to_a_module_are_frozen(until, left, exits):
    model = network(replace(DIGITS, freeze_backbone=until, exits=exits), [9] * 10)
    assert trained(model) == left
    assert all(p.requires_grad for p in model.heads.parameters())


@pytest.mark.parametrize("loss", ["cross_entropy", "ldam"])
def test_frozen_parameters_and_statistics_stay_as_they_are(loss):
    config = replace(ADAMW, freeze_backbone="layer2", loss=loss, model_ema=True)
    learner = Learner(config, network(config, [9] * 10), CPU)
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    train_mode(learner.model)
    out, _ = learner.forward(torch.randn(8, 3, 16, 16), torch.arange(8))
    learner.backward(out.loss)
    learner.update()
    changed = {
        name for name, value in learner.model.state_dict().items()
        if name.startswith("stages.") and not torch.equal(value, before[name])
    }  # fmt: skip
    moved = {backbone_name(name).split(".")[0] for name in changed}
    assert moved == {"layer3", "fc"}
    held = {id(p) for group in learner.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in learner.model.parameters() if p.requires_grad}
    norms = [m for m in learner.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {norm.training for norm in norms} == {True, False}


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="^freeze_backbone: expected all or a module of CifarRes.*"
                       "got 'layr2'; near names: layer2"):  # fmt: skip
        network(replace(DIGITS, freeze_backbone="layr2"), [9] * 10)


@pytest.mark.parametrize("exits", [None, ()], ids=["exits", "plain"])
def test_rates_fall_from_the_last_layers_to_the_first(exits):
    config = replace(ADAMW, layer_decay=0.5, exits=exits)
    model = network(config, [9] * 10)
    scales = layer_scales(config, model)
    by_module: dict[str, set[float]] = {}
    for name, scale in scales.items():
        inner = backbone_name(name)
        by_module.setdefault(inner.split(".")[0] if inner else "heads", set()).add(scale)
    expected = {"conv1": {1 / 16}, "bn1": {1 / 16}, "layer1": {1 / 8}, "layer2": {1 / 4},
                "layer3": {1 / 2}, "fc": {1.0}, "heads": {1.0}}  # fmt: skip
    if exits == ():
        del expected["heads"]
    assert by_module == expected

    learner = Learner(config, model, CPU)
    learner.lr = 0.3
    names = {id(p): name for name, p in model.named_parameters()}
    for group in learner.optimizer.param_groups:
        for parameter in group["params"]:
            assert group["lr"] == 0.3 * scales[names[id(parameter)]]
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)
    assert sum(len(group["params"]) for group in learner.optimizer.param_groups) == len(scales)
    assert learner.summary() == [
        "learning rate from the first layers to the last: lr times 0.0625, 0.125, 0.25, 0.5, 1"
    ]


def test_depths_of_other_networks():
    names = ["cls", "patch.w", "blocks.0.a", "blocks.0.b", "blocks.10.a", "norm.w", "head.w"]
    assert list(depths(names).values()) == [0, 0, 1, 1, 2, 3, 3]
    with pytest.raises(ValueError, match="^layer_decay: the network has no layer1, layer2"):
        depths(["a.weight", "b.weight"])
