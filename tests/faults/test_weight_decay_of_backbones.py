"""What a backbone excludes from weight decay is not decayed inside an ELF, either."""

from __future__ import annotations

import copy
import io
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import elf_fast
from elf_fast import ELF, ExitHead, from_backbone, reference
from elf_fast.base import ELFBase
from elf_fast.models import split
from elf_fast.runs import datasets, networks
from elf_fast.runs.config import TrainConfig
from elf_fast.training import schedule

timm = pytest.importorskip("timm")
C = 3
CONFIG = TrainConfig(dataset="digits", opt="adamw", weight_decay=0.1)


def decayed(model: nn.Module) -> set[str]:
    """Names, without those of stages and heads, that the optimiser of a run decays."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = schedule.optimizer(CONFIG, model).param_groups
    found = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    if not isinstance(model, ELFBase):
        return found
    return {name.split(".", 2)[2] if name.startswith("stages.") else name for name in found}


def of_timm(name: str, size: int, **options) -> tuple[nn.Module, Tensor]:
    net = timm.create_model(name, num_classes=C, **options)
    return net, torch.zeros(1, 3, size, size)


VIT = dict(img_size=32, embed_dim=24, num_heads=2, depth=2)
SWIN = dict(
    img_size=32, window_size=4, embed_dim=24, depths=(1, 1), num_heads=(2, 2), mlp_ratio=1.0
)
NETWORKS = {
    "vit": (lambda: of_timm("vit_tiny_patch16_224", 32, **VIT), "blocks.0"),
    "deit": (lambda: of_timm("deit_tiny_distilled_patch16_224", 32, **VIT), "blocks.0"),
    "swin": (lambda: of_timm("swin_tiny_patch4_window7_224", 32, **SWIN), "layers.0"),
    "swin v2": (lambda: of_timm("swinv2_tiny_window8_256", 32, **SWIN), "layers.0"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_timm_are_decayed_as_without_exits(name):
    make, exit = NETWORKS[name]
    torch.manual_seed(0)
    net, x = make()
    alone = decayed(net)
    excluded = {name for name, p in net.named_parameters() if p.dim() > 1} - alone
    assert excluded
    model = from_backbone(net, [exit], C, example_input=x)
    assert decayed(model) == alone | {"heads.0.classifier.weight"}
    assert decayed(ELF([net], [nn.Identity()])) == alone
    assert {n.split(".", 2)[2] for n in model.no_weight_decay()} >= excluded


class Body(nn.Module):
    """A module inside a backbone with its own list, relative to itself, with a wildcard."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 4))
        self.table = nn.Parameter(torch.ones(1, 4))
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def no_weight_decay(self) -> list[str]:
        return ["scale", "sec*"]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * self.scale + self.table)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.last, self.fc = Body(), nn.Linear(4, 4), nn.Linear(4, C)
        self.unused = nn.Parameter(torch.ones(2, 2))

    def no_weight_decay(self) -> set[str]:
        return {"last.weight", "unused", "not there"}

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(self.body(x)))


X = torch.randn(4, 4)
EXPECTED = {"body.table", "body.first.weight", "fc.weight"}


@pytest.mark.parametrize("exits", [["body"], ["body.first"], ["body", "last"]])
def test_lists_of_opened_and_called_modules_are_kept(exits):
    """`body` is opened by tracing if it contains an exit, else called."""
    model = from_backbone(Net(), exits, C, example_input=X)
    own = {f"heads.{e}.classifier.weight" for e in range(len(exits))}
    assert decayed(model) == EXPECTED | own


def test_copies_keep_the_list():
    model = from_backbone(Net(), ["body.first"], C, example_input=X)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    pickled = torch.load(buffer, weights_only=False)
    twins = (copy.deepcopy(model), pickled, elf_fast.unfuse(model), reference.ELF(
        [Net()], [nn.Identity()]))  # fmt: skip
    expected = {"stages.1.body.second.weight", "stages.1.last.weight", "stages.1.body.scale"}
    for twin in twins[:3]:
        assert expected <= twin.no_weight_decay() <= set(dict(twin.named_parameters()))
        assert decayed(twin) == EXPECTED | {"heads.0.classifier.weight"}
    assert decayed(twins[3]) == EXPECTED


def test_parts_that_are_replaced_are_forgotten():
    model = from_backbone(Net(), ["body.first"], C, example_input=X)
    assert "stages.1.last.weight" in model.no_weight_decay()
    model.stages[1] = nn.Linear(4, C)
    assert model.no_weight_decay() == set()


def test_an_elf_that_is_built_by_hand_asks_its_modules():
    model = ELF([Body(), nn.Linear(4, 4)], [ExitHead(4, C), Body()])
    names = {"stages.0.scale", "stages.0.second.weight", "stages.0.second.bias"}
    assert model.no_weight_decay() == names | {n.replace("stages.0", "heads.1") for n in names}
    model.stages[0] = nn.Linear(4, 4)
    assert not any(name.startswith("stages") for name in model.no_weight_decay())
    plain = ELF(split(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, C)), ["0"]),
                [ExitHead(4, C), nn.Identity()])  # fmt: skip
    assert plain.no_weight_decay() == set()


@pytest.mark.parametrize("exits", [("blocks.0",), ()])
def test_runs_with_and_without_exits(exits):
    size = datasets.image_size(CONFIG)
    options = VIT | {"img_size": size, "patch_size": size // 2}
    config = replace(CONFIG, model="timm/vit_tiny_patch16_224", model_kwargs=options, exits=exits)
    model = networks.network(config, [5] * C)
    assert {n.split(".", 2)[2] for n in model.no_weight_decay()} == {"pos_embed", "cls_token"}
    assert all(name.endswith(".weight") for name in decayed(model))
