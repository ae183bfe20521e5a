"""Modules may have any name that PyTorch allows: keywords of Python, dashes, quotes, letters."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import elf_fast
from elf_fast import from_backbone

C = 3
X = torch.randn(4, 5)
NAMES = ["class", "None", "lambda", "a-b", "a b", "3d", "it's", 'say "x"', "back\\slash", "naïve",
         "ﬁt", "new\nline", "self", "x", "features", "match"]  # fmt: skip


def network(*names: str) -> nn.Module:
    """Linear layers of these names in a row, and a classifier."""
    torch.manual_seed(0)
    net = nn.Sequential()
    for name in names:
        net.add_module(name, nn.Linear(5, 5))
    net.add_module("fc", nn.Linear(5, C))
    return net


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def check(net: nn.Module, exits: list[str]) -> None:
    model = from_backbone(net, exits, C, example_input=X, thresholds=float("inf"))
    names = [name for stage in model.stages for name in stage.state_dict()]
    assert sorted(names) == sorted(net.state_dict())
    expected = net(X)
    twins = (copy.deepcopy(model), pickled(model), pickle.loads(pickle.dumps(model)),
             copy.deepcopy(pickled(pickled(model))), elf_fast.unfuse(model))  # fmt: skip
    for twin in (model, *twins):
        assert torch.equal(twin.eval()(X).logits, expected)
        assert list(twin.state_dict()) == list(model.state_dict())
    twins[0].load_state_dict(model.state_dict())
    model.train()(X, torch.arange(4) % C).loss.backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_module_of_this_name_is_called(name):
    check(network("first", name), ["first"])
    check(network(name, "second"), [name])


def test_names_inside_names():
    """Only the awkward part of a path is spelt otherwise, wherever it stands."""
    net = nn.Sequential()
    net.add_module("def", network("class", "classes", "class-1", "0"))
    net.add_module("class", nn.Linear(C, C))
    net.add_module("classes", nn.Linear(C, C))
    check(net, ["def.class", "def.class-1"])
    check(net, ["def.classes", "class"])


def test_parameters_and_buffers_of_this_name():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.fc = nn.Linear(5, 5), nn.Linear(5, C)
            self.register_parameter("lambda", nn.Parameter(torch.full((5,), 2.0)))
            self.register_buffer("in", torch.full((5,), 3.0))
            self.register_buffer("is-not", torch.full((5,), 4.0), persistent=False)

        def forward(self, x):
            x = self.a(x * getattr(self, "lambda"))
            return self.fc(x * getattr(self, "in") + getattr(self, "is-not"))

    net = Net()
    model = from_backbone(net, ["a"], C, example_input=X, thresholds=float("inf")).eval()
    names = {name for stage in model.stages for name in stage.state_dict()}
    assert names == set(net.state_dict())
    for twin in (model, copy.deepcopy(model), pickled(model)):
        assert torch.equal(twin(X).logits, net(X))


def test_stages_of_this_name_compile():
    model = from_backbone(network("first", "class"), ["first"], C, example_input=X)
    compiled = torch.compile(model.stages[1], backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), model.stages[1](X))


@pytest.mark.parametrize("name", ["graph", "code", "meta", "recompile"])
def test_names_that_torch_fx_needs_itself_are_refused(name):
    with pytest.raises(ValueError, match=f'^backbone: expected no attribute called "{name}"'):
        from_backbone(network("first", name), ["first"], C, example_input=X)
    net = nn.Sequential()
    net.add_module("body", network("first", name))
    check(net, ["body.first"])
