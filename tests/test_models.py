"""`from_backbone` and `split`: stages that are the backbone's, and clear errors where it is not
possible."""

from __future__ import annotations

import copy
import doctest
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import elf_fast
from elf_fast import ExitHead, models
from elf_fast.models import from_backbone, split

C = 5
NEVER = math.inf


def torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return getattr(pytest.importorskip("torchvision.models"), name)(num_classes=C, **options)

    return build


def timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return pytest.importorskip("timm").create_model(name, num_classes=C, **options)

    return build


def plain() -> nn.Module:
    """Exits by index; the ReLU after the first one writes into the features there."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.2)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, C),
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    exits: tuple[str, ...]
    size: int = 32

    def make(self) -> tuple[nn.Module, Tensor]:
        """In float64, so that the order of sums in smaller batches changes no result."""
        torch.manual_seed(0)
        return self.build().double(), torch.randn(6, 3, self.size, self.size).double()


VIT = dict(image_size=16, patch_size=8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32)
SWIN = dict(
    patch_size=[4, 4], embed_dim=24, depths=[2, 1, 1], num_heads=[2, 2, 2], window_size=[4, 4]
)
CASES = [
    Case("Sequential", plain, ("0", "3"), 12),
    Case("resnet18", torchvision("resnet18"), ("layer1", "layer2.0", "layer3")),
    Case("resnet50", torchvision("resnet50"), ("layer1", "layer2", "layer3")),
    Case("mobilenet_v3_small", torchvision("mobilenet_v3_small"), ("features.2", "features.8")),
    Case("efficientnet_b0", torchvision("efficientnet_b0"), ("features.2", "features.5")),
    Case("convnext_tiny", torchvision("convnext_tiny"), ("features.1", "features.3")),
    Case(
        "regnet_y_400mf",
        torchvision("regnet_y_400mf"),
        ("trunk_output.block1", "trunk_output.block3"),
    ),
    Case(
        "VisionTransformer",
        torchvision("VisionTransformer", **VIT, dropout=0.1, attention_dropout=0.1),
        ("encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"),
        16,
    ),
    Case("densenet121", torchvision("densenet121"), ("features.denseblock1", "features")),
    Case("SwinTransformer", torchvision("SwinTransformer", **SWIN), ("features.1", "features.3")),
    Case("timm resnet18", timm("resnet18", drop_rate=0.2), ("layer1", "layer2", "layer3")),
    Case("timm resnet26", timm("resnet26"), ("layer1", "layer2", "layer3")),
    Case("timm vit_tiny", timm("vit_tiny_patch16_224", img_size=32), ("blocks.2", "blocks.5")),
    Case(
        "timm deit_tiny",
        timm("deit_tiny_patch16_224", img_size=32, drop_path_rate=0.1),
        ("blocks.3",),
    ),
    Case("timm convnext_atto", timm("convnext_atto"), ("stages.0", "stages.1", "stages.2")),
    Case("timm efficientnet_lite0", timm("efficientnet_lite0"), ("blocks.1", "blocks.3")),
    Case("timm mobilenetv3", timm("mobilenetv3_small_050"), ("blocks.1", "blocks.3")),
    Case("timm regnety_002", timm("regnety_002"), ("s1", "s2", "s3")),
    Case(
        "timm swin_tiny",
        timm(
            "swin_tiny_patch4_window7_224",
            img_size=32,
            window_size=4,
            embed_dim=24,
            depths=(2, 1, 1),
            num_heads=(2, 2, 2),
        ),
        ("layers.0", "layers.1"),
    ),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def original(case) -> tuple[nn.Module, Tensor, elf_fast.ELF]:
    """(network, example, ELF) of a case, for tests that change nothing."""
    net, x = case.make()
    return net, x, cut(net, x, case.exits)


@pytest.fixture
def made(original) -> tuple[nn.Module, Tensor, elf_fast.ELF]:
    """The same, for one test alone. A copy is made faster than an ELF."""
    return copy.deepcopy(original)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """One CPU thread: on small batches, waiting for a second one takes longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cut(net: nn.Module, x: Tensor, exits: Any, **options: Any) -> elf_fast.ELF:
    return from_backbone(net, exits, C, example_input=x, **options)


def test_inference_without_exits_is_the_backbones(case):
    net, x = case.make()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    model = cut(net, x, case.exits, thresholds=NEVER)
    assert type(model) is elf_fast.ELF
    assert len(model.stages) == len(case.exits) + 1
    assert all(type(head) is ExitHead for head in list(model.heads)[:-1])
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    with torch.no_grad():
        assert torch.equal(model.eval()(x).logits, net.eval()(x))


def test_stages_share_the_backbone(original):
    net, _, model = original
    found: dict[str, Tensor] = {}
    for stage in model.stages:
        ours = dict(stage.state_dict(keep_vars=True))
        assert not set(ours) & set(found), "in two stages"
        found |= ours
    theirs = dict(net.state_dict(keep_vars=True))
    assert set(found) == set(theirs)
    for name, value in found.items():
        assert value is theirs[name], name
    for name, p in model.stages[0].named_parameters():
        assert isinstance(p, nn.Parameter), name


def test_gradients_are_the_backbones(case, made):
    net, x, model = made
    twin = copy.deepcopy(net)
    model.thresholds, model.exit_weights = NEVER, [0.0] * len(case.exits) + [1.0]
    target = torch.arange(len(x)) % C
    torch.manual_seed(1)
    model.train()(x, target).loss.backward()
    torch.manual_seed(1)
    F.cross_entropy(twin.train()(x), target).backward()
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None, name
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9, msg=name)
    for (name, a), b in zip(net.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def standardise(head: ExitHead, features: Tensor) -> None:
    """Gives the logits mean 0 and standard deviation 1 over the samples. In an untrained network
    they hardly differ."""
    z = head(features)
    head.classifier.weight /= z.std(dim=0)[:, None]
    head.classifier.bias.sub_(z.mean(dim=0)).div_(z.std(dim=0))


@torch.no_grad()
def one_leaves_at_each_exit(model: elf_fast.ELF, x: Tensor) -> tuple[Tensor, Tensor]:
    """Sets heads and thresholds so that one sample leaves at every exit but the last. Returns exit
    indices [N] and logits [N, C], computed for all samples at every exit."""
    exit_index = torch.full((len(x),), len(model.stages) - 1)
    logits = torch.empty(len(x), C, dtype=x.dtype)
    for e, (stage, head) in enumerate(zip(model.stages, model.heads, strict=True)):
        x = stage(x)
        here = exit_index >= e
        if e < len(model.thresholds):
            standardise(head, x)
        z = head(x.clone())
        if e < len(model.thresholds):
            confidence = z.softmax(dim=1).amax(dim=1)
            model.thresholds[e] = confidence[here].sort().values[-2:].mean()
            exit_index[here & (confidence >= model.thresholds[e])] = e
        logits[here] = z[here]
    return exit_index, logits


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_samples_leave_at_their_exit_in_input_order(case, made, memory_format):
    _, x, model = made
    model.eval().to(memory_format=memory_format)
    x = x.to(memory_format=memory_format)
    exit_index, logits = one_leaves_at_each_exit(model, x)
    assert exit_index.unique().tolist() == list(range(len(case.exits) + 1))
    with torch.no_grad():
        out = model(x)
    assert torch.equal(out.exit_index, exit_index)
    torch.testing.assert_close(out.logits, logits, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("drop_exited", [True, False])
def test_training_step(case, made, drop_exited):
    _, x, model = made
    model.thresholds = [0.9] + [NEVER] * (len(case.exits) - 1)
    model.drop_exited = drop_exited
    model.train()
    with torch.no_grad():
        model.heads[0].classifier.bias[0] = 1e4  # exit 0 is sure of class 0 for any input
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    out = model(x, torch.tensor([1, 0, 2, 0, 3, 1]))
    last = len(case.exits)
    assert out.exit_index.tolist() == [last, 0, last, 0, last, last]
    out.loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == []
    weights = [head.classifier.weight.clone() for head in list(model.heads)[:-1]]
    optimizer.step()
    for head, weight in zip(model.heads, weights, strict=False):
        assert not torch.equal(head.classifier.weight, weight)


def test_checkpoints_and_copies(case, made):
    _, x, model = made
    model.eval()
    exit_index, _ = one_leaves_at_each_exit(model, x)
    other_net, _ = case.make()
    with torch.no_grad():
        for p in other_net.parameters():
            p.add_(0.01)
    other = cut(other_net, x, case.exits, thresholds=0.7).eval()
    other.load_state_dict(model.state_dict())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    pickled = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(expected.exit_index, exit_index)
        for twin in (other, pickled, copy.deepcopy(model), elf_fast.unfuse(model)):
            assert list(twin.state_dict()) == list(model.state_dict())
            out = twin(x)
            assert torch.equal(out.exit_index, expected.exit_index)
            torch.testing.assert_close(out.logits, expected.logits)


def make_plain() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return plain(), torch.randn(4, 3, 12, 12)


class Net(nn.Module):
    """Conv, two blocks and a classifier, joined by the `forward` a test gives."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p
        self.stem = nn.Conv2d(3, 4, 3)
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, C)
        self.register_buffer("scale", torch.full((4, 1, 1), 2.0))
        self.register_buffer("shift", torch.full((4, 1, 1), 3.0), persistent=False)
        self.offset = torch.full((4, 1, 1), 4.0)

    def logits(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Any:
        return self.logits(self.b(self.a(self.stem(x))))


def network(forward: Callable[..., Any]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return type("Custom", (Net,), {"forward": forward})(), torch.randn(4, 3, 8, 8)


def same_in_both_modes(model: elf_fast.ELF, net: nn.Module, x: Tensor) -> None:
    for training in (True, False, True):
        torch.manual_seed(1)
        ours = model.train(training)(x).logits
        torch.manual_seed(1)
        theirs = net.train(training)(x)
        assert torch.equal(ours, theirs), f"training={training}"


def test_functional_dropout_follows_the_mode():
    def forward(self, x):
        x = F.dropout(self.a(self.stem(x)), self.p, self.training)
        x = F.dropout(self.b(x), self.p if self.training else 0.0)
        return self.logits(x[:, : 2 if self.training else 4].repeat(1, 4, 1, 1)[:, :4])

    net, x = network(forward)
    model = cut(net, x, ["a"], thresholds=NEVER)
    same_in_both_modes(model, net, x)
    same_in_both_modes(copy.deepcopy(model), net, x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    same_in_both_modes(torch.load(buffer, weights_only=False), net, x)
    compiled = torch.compile(model.stages[1], backend="eager")
    features = model.stages[0](x)
    for training in (True, False):
        model.train(training)
        torch.manual_seed(1)
        ours = compiled(features)
        torch.manual_seed(1)
        assert torch.equal(ours, model.stages[1](features))


def test_tensors_the_forward_reads():
    """A saved buffer, one that is not saved, a plain attribute and a constant, used on both sides
    of the cut; what the checkpoint holds stays as it is."""

    def forward(self, x):
        x = self.a(self.stem(x) * self.scale.expand(x.shape[0], 4, 1, 1) + self.shift)
        x = self.b(x * torch.tensor([2.0]) + self.offset - self.shift)
        return self.logits(x)

    net, x = network(forward)
    attributes = set(vars(net))
    model = cut(net, x, ["a"], thresholds=NEVER)
    assert set(vars(net)) == attributes
    same_in_both_modes(model, net, x)
    keys = [key for stage in model.stages for key in stage.state_dict()]
    assert sorted(keys) == sorted(net.state_dict())
    assert model.stages[0].scale is net.scale
    twin = copy.deepcopy(model)
    assert list(twin.state_dict()) == list(model.state_dict())
    same_in_both_modes(twin, net, x)


def test_further_arguments_keep_their_defaults():
    def forward(self, x, double=False, *, scale=None):
        x = self.b(self.a(self.stem(x)))
        if double:
            x = x * 2
        return self.logits(x if scale is None else x * scale)

    net, x = network(forward)
    same_in_both_modes(cut(net, x, ["a"], thresholds=NEVER), net, x)


def test_sizes_read_after_the_cut_are_those_of_the_survivors():
    def forward(self, x):
        x = self.a(self.stem(x))
        N, channels, height, width = x.shape
        x = self.b(x).reshape(N, channels, height * width)
        return self.fc(x.mean(2))

    net, x = network(forward)
    model = cut(net, x, ["a"], thresholds=NEVER)
    same_in_both_modes(model, net, x)
    features = model.stages[0](x)
    assert model.stages[1](features[:2]).shape == (2, C)


def test_unused_sizes_do_not_cross():
    def forward(self, x):
        shape = x.shape
        torch._assert(shape[2] == 8, "the wrong height")
        x = self.a(self.stem(x))
        N, _, height, width = shape
        return self.logits(self.b(x))

    net, x = network(forward)
    model = cut(net, x, ["a"])
    with pytest.raises(AssertionError, match="the wrong height"):
        model(x[:, :, 1:])


def test_nested_exits():
    def forward(self, x):
        return self.logits(self.tail(self.a(self.stem(x))))

    net, x = network(forward)
    net.tail = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1)))
    model = cut(net, x, ["tail.0", "tail.1.0", "tail"], thresholds=NEVER)
    same_in_both_modes(model, net, x)
    assert len(model.stages) == 4


def test_modes_are_left_as_found():
    net, x = make_plain()
    net.eval()
    net[0].train()
    net[3][1].eval()
    before = [m.training for m in net.modules()]
    running = net[3][1].running_mean.clone()
    model = cut(net, x, ["2"])
    assert [m.training for m in net.modules()] == before
    assert torch.equal(net[3][1].running_mean, running)
    assert not model.training and not model.heads[0].training
    assert cut(net.train(), x, ["2"]).training


def test_a_stage_that_writes_into_its_input_works_on_a_copy():
    """The convolution of the head needs the features for its gradient."""
    net, x = make_plain()
    model = cut(net, x, ["0"], conv=True, thresholds=NEVER).train()
    model(x, torch.arange(4)).loss.backward()
    features = model.stages[0](x)
    kept = features.clone()
    model.stages[1](features)
    assert torch.equal(features, kept)
    assert not any("clone" in stage.code for stage in cut(net, x, ["1"]).stages)


def test_conv_heads_read_the_features_at_their_exit():
    net, x = make_plain()
    model = cut(net.eval(), x, ["1", "3"], conv=True)
    features = (net[:2](x), net[:4](x))
    assert [head.stem[0].in_channels for head in model.heads[:-1]] == [6, 8]
    for e, (head, maps) in enumerate(zip(model.heads[:-1], features, strict=True)):
        model.thresholds = [0.0 if i == e else NEVER for i in range(2)]
        out = model(x)
        assert out.exit_index.tolist() == [e] * 4
        torch.testing.assert_close(out.logits, head.classifier(head.stem(maps).mean((2, 3))))
    model.train()(x, torch.arange(4)).loss.backward()
    assert all(p.grad.any() for head in model.heads[:-1] for p in head.stem[0].parameters())


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (33, 50)])
def test_channels_at_the_end_are_averaged_over_height_and_width(size):
    def forward(self, x):
        x = self.a(self.stem(x).permute(0, 2, 3, 1))
        return self.fc(self.b(x).mean((1, 2)))

    net, _ = network(forward)
    net.stem = nn.Conv2d(3, 24, 4, stride=4)
    net.a, net.b, net.fc = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, C)
    x = torch.randn(3, 3, *size)
    model = cut(net, x, ["stem", "a"]).eval()
    assert [head.classifier.in_features for head in list(model.heads)[:-1]] == [24, 24]
    features = torch.randn(3, 8, 6, 24)
    torch.testing.assert_close(
        model.heads[1](features), model.heads[1].classifier(features.mean((1, 2)))
    )
    with pytest.raises(ValueError, match=r'^conv: .*\(read as \[N, H, W, D\]\) from "a"'):
        cut(net, x, ["a"], conv=True)


def test_heads_take_the_backbones_dtype_even_under_autocast():
    net, x = make_plain()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model = cut(net, x, ["1"], thresholds=NEVER).train()
        out = model(x, torch.arange(4))
    assert model.heads[0].classifier.weight.dtype == torch.float32
    assert out.logits.dtype == torch.bfloat16 and out.loss.isfinite()
    half, x = plain().bfloat16(), x.bfloat16()
    assert cut(half, x, ["1"]).heads[0].classifier.weight.dtype == torch.bfloat16


def test_split_gives_stages_for_heads_of_ones_own():
    net, x = make_plain()
    first, second = split(net, ("2",))
    assert torch.equal(second.eval()(first.eval()(x)), net.eval()(x))
    head = nn.Sequential(nn.Flatten(), nn.LazyLinear(C))
    model = elf_fast.ELF([first, second], [head, nn.Identity()], thresholds=0.0).eval()
    torch.testing.assert_close(model(x).logits, head(net[:3](x)))
    model.thresholds = NEVER
    assert torch.equal(model(x).logits, net(x))


def test_options_reach_elf():
    net, x = make_plain()
    loss = elf_fast.losses.BalancedSoftmaxLoss(torch.arange(1, C + 1))
    options: dict[str, Any] = dict(
        thresholds=0.4, train_thresholds=0.5, temperatures=2.0, criterion="margin", exit_loss=loss,
        exit_weights=[1.0, 0.5], drop_exited=False,
    )  # fmt: skip
    model = cut(net, x, ["1"], **options)
    assert model.thresholds.tolist() == pytest.approx([0.4])
    assert model.train_thresholds.tolist() == pytest.approx([0.5])
    assert model.temperatures.tolist() == [2.0]
    assert (model.criterion, model.exit_loss, model.drop_exited) == ("margin", loss, False)
    assert model.exit_weights == (1.0, 0.5)
    with pytest.raises(TypeError, match="unknown"):
        cut(net, x, ["1"], unknown=1)


def test_examples():
    """Those of the docstrings."""
    tests = doctest.testmod(models, extraglobs={"nn": nn, "torch": torch})
    assert tests.attempted and not tests.failed


class TestErrors:
    @pytest.mark.parametrize(
        "exits, error, message",
        [
            ("1", TypeError, r"^exits: expected a list of module names, got '1' \(str\)"),
            (None, TypeError, "^exits: expected a list of module names, got None"),
            ([1], TypeError, r"^exits: expected module names, got 1 \(int\)"),
            ([], ValueError, "^exits: expected at least one module name, got none"),
            (["7"], ValueError, '^exits: no module named "7" in Sequential; its children: 0, 1, 2'),
            (["3.7"], ValueError, "^exits: no module .* near names: 3.[012]"),
            ([""], ValueError, '^exits: no module named ""'),
            (["1", "1"], ValueError, '^exits: expected different modules, got "1" and "1"'),
            (["3", "1"], ValueError, r"order in which they run, \['1', '3'\], got \['3', '1'\]"),
            (["3.2", "3"], ValueError, '"3.2" and "3", which return the same tensor'),
            (["1", "6"], ValueError, 'left to run after the last exit, got "6"'),
        ],
    )
    def test_names(self, exits, error, message):
        net, x = make_plain()
        with pytest.raises(error, match=message):
            cut(net, x, exits)
        with pytest.raises(error, match=message):
            split(net, exits)

    def test_near_names(self):
        resnet = torchvision("resnet18")()
        with pytest.raises(ValueError) as error:
            split(resnet, ["layr1"])
        message = str(error.value)
        assert message.startswith('exits: no module named "layr1" in ResNet; near names: layer')

    @pytest.mark.parametrize(
        "arguments, error, message",
        [
            (dict(backbone="net"), TypeError, "^backbone: expected an nn.Module, got 'net'"),
            (dict(num_classes=7), ValueError, "^num_classes: expected 5, .*, got 7; replace its"),
            (dict(num_classes=0), ValueError, "^num_classes: expected a positive integer, got 0"),
            (dict(num_classes=True), ValueError, "^num_classes: expected a positive .* got True"),
            (dict(example_input=[1.0]), TypeError, "^example_input: expected a tensor, got"),
            (
                dict(example_input=torch.tensor(1.0)),
                ValueError,
                r"^example_input: expected a batch \[N, ...\]",
            ),
            (
                dict(example_input=torch.ones(0, 3, 12, 12)),
                ValueError,
                r"^example_input: expected a batch \[N, ...\] with N >= 1, .*\[0, 3, 12, 12\]",
            ),
            (
                dict(example_input=torch.ones(2, 4, 12, 12)),
                ValueError,
                r"^example_input: expected a batch that the backbone takes, .*\[2, 4, 12, 12\]",
            ),
            (
                dict(exits=["5"], conv=True),
                ValueError,
                r'^conv: expected features \[N, D, H, W\], got \[4, 8\] from "5"',
            ),
        ],
    )
    def test_arguments(self, arguments, error, message):
        net, x = make_plain()
        given = dict(backbone=net, exits=["1"], num_classes=C, example_input=x) | arguments
        with pytest.raises(error, match=message):
            from_backbone(**given)

    def check(self, forward, message, exits=("a",), error=ValueError):
        net, x = network(forward)
        before = [m.training for m in net.modules()], set(vars(net))
        with pytest.raises(error, match=message) as caught:
            cut(net, x, exits)
        assert before == ([m.training for m in net.modules()], set(vars(net)))
        return caught.value

    def test_skip_connection(self):
        def forward(self, x):
            x = self.stem(x)
            return self.logits(x + self.b(self.a(x)))

        self.check(
            forward, 'only the output of "a" crosses .* got also "stem" \\(read by add\\(\\)'
        )

    def test_inside_a_residual_block(self):
        resnet = torchvision("resnet18")()
        with pytest.raises(ValueError, match='got also "maxpool" .read by add'):
            split(resnet, ["layer1.0.conv1"])

    def test_batch_size(self):
        def forward(self, x):
            N = x.shape[0]
            return self.fc(self.b(self.a(self.stem(x))).reshape(N, 4, -1).mean(2))

        self.check(forward, r'"a" crosses .* got also the network\'s input.shape\[0\] .read by')

    def test_several_calls(self):
        def forward(self, x):
            return self.logits(self.b(self.a(self.a(self.stem(x)))))

        self.check(forward, '^exits: .* the forward calls once, got 2 calls of "a" .Conv2d.')

    def test_no_call(self):
        def forward(self, x):
            return self.logits(self.b(self.stem(x)))

        self.check(forward, '^exits: .* the forward calls once, got none of "a" .Conv2d.')

    def test_a_list_of_modules(self):
        holder, x = network(lambda self, x: self.logits(self.blocks[1](self.blocks[0](x))))
        holder.blocks = nn.ModuleList([nn.Conv2d(3, 4, 1), nn.ReLU()])
        with pytest.raises(ValueError, match=r'got none of "blocks" .* holds blocks.0, blocks.1'):
            cut(holder, x, ["blocks"])

    def test_control_flow(self):
        def forward(self, x):
            x = self.a(self.stem(x))
            return self.logits(self.b(x) if x.sum() > 0 else x)

        error = self.check(forward, "^backbone: .*Custom raised TraceError.*by hand$")
        assert isinstance(error.__cause__, torch.fx.proxy.TraceError)

    def test_second_argument(self):
        def forward(self, x, mask):
            return self.logits(self.a(self.stem(x)) * mask)

        self.check(forward, "^backbone: .*missing 1 required positional argument: 'mask'")

    def test_modes_that_differ(self):
        def forward(self, x):
            x = self.a(self.stem(x))
            return self.logits(self.b(x) if self.training else x)

        self.check(forward, '^backbone: .* got "b" in training and .mean.. in evaluation')

    def test_constants_that_differ(self):
        def forward(self, x):
            x = self.a(self.stem(x)) * torch.tensor(2.0 if self.training else 1.0)
            return self.logits(x)

        self.check(forward, "^backbone: expected a forward that runs the same operations")

    def test_hook_that_is_lost(self):
        net, x = make_plain()
        net.register_forward_hook(lambda module, args, out: out + 1)
        with pytest.raises(ValueError, match="^backbone: expected no hook on Sequential, which"):
            cut(net, x, ["1"])

    def test_state_that_is_lost(self):
        """A forward whose logits depend on how often it was called."""
        calls = []

        def forward(self, x):
            calls.append(x)
            return self.logits(self.b(self.a(self.stem(x)))) + len(calls)

        self.check(forward, r"^backbone: .* got 1 in add\(\) once and 2 another time; .* state")

    @pytest.mark.parametrize("N", [1, 2, 4])
    @pytest.mark.parametrize(
        "turned, message", [(True, "exits: .* N = "), (False, r"backbone: .*\[")]
    )
    def test_samples_in_another_dimension(self, N, turned, message):
        """[T, N, D] with as many steps as samples."""

        class Sequences(Net):
            def forward(self, x):
                return self.fc(self.a(x.transpose(0, 1) if turned else x).mean(0))

        net = Sequences()
        net.a = nn.TransformerEncoderLayer(4, 2, 4)
        with pytest.raises(ValueError, match=f"^{message}{3 if N == 2 else 2}"):
            cut(net, torch.randn(N, N, 4), ["a"])

    def test_several_outputs(self):
        def forward(self, x):
            x = self.a(self.stem(x))
            return self.logits(x), x

        self.check(
            forward, r"^backbone: expected a forward that returns logits \[N, C\], got tuple"
        )

    def test_output_of_a_module_that_is_no_tensor(self):
        class Pair(nn.Module):
            def forward(self, x):
                return x, x

        net, x = make_plain()
        with pytest.raises(
            ValueError, match="^backbone: expected its forward to return one tensor, got tup"
        ):
            cut(nn.Sequential(*net, Pair()), x, ["1"])

    def test_logits_that_are_no_rows(self):
        def forward(self, x):
            return self.a(self.stem(x)).relu()

        self.check(forward, r"^backbone: expected logits of shape \[4, C\], got .*\[4, 4, 6, 6\]")

    @pytest.mark.parametrize("opened", [False, True])
    def test_exit_that_is_no_tensor(self, opened):
        class Pair(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = nn.Identity()

            def forward(self, x):
                return self.inner(x), x

        net, x = network(lambda self, x: self.logits(self.pair(self.stem(x))[0]))
        net.pair = Pair()
        exits = ["pair.inner", "pair"] if opened else ["pair"]
        with pytest.raises(ValueError, match='expected "pair" to return one tensor, got tuple'):
            cut(net, x, exits)

    @pytest.mark.parametrize(
        "module", [nn.Flatten(0), nn.Unflatten(1, (2, 2, 1)), nn.AdaptiveMaxPool2d((1, 0))]
    )
    def test_features_of_another_shape(self, module):
        net, x = network(lambda self, x: self.logits(self.put_back(self.odd(self.stem(x)))))
        net.odd = module
        net.put_back = type(
            "PutBack", (nn.Module,), {"forward": lambda self, y: y.new_ones(4, 4, 6, 6)}
        )()
        with pytest.raises(ValueError, match=r'^exits: expected "odd" to return features \[N, D\]'):
            cut(net, x, ["odd"])
