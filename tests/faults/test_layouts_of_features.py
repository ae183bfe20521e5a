"""Which dimension of an exit's features holds the channels is known or asked for, never guessed."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from elf_fast import from_backbone

C = 5


class Net(nn.Module):
    """`before`, the exit `a`, and `after`, joined by functions."""

    def __init__(self, before: nn.Module, a: nn.Module, after: nn.Module, channels: int) -> None:
        super().__init__()
        self.before, self.a, self.after, self.fc = before, a, after, nn.Linear(channels, C)

    def forward(self, x: Tensor) -> Tensor:
        x = self.after(self.a(self.before(x)))
        return self.fc(x)


class Lambda(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Channels2d(nn.LayerNorm):
    """Normalises over the channels of [N, D, H, W], as timm's and torchvision's LayerNorm2d do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def mean(*dims: int) -> nn.Module:
    return Lambda(lambda x: x.mean(dims))


def turned(*dims: int) -> nn.Module:
    return Lambda(lambda x: x.permute(dims))


def head_of(net: nn.Module, x: Tensor, exit: str = "a", **options):
    torch.manual_seed(0)
    return from_backbone(net, [exit], C, example_input=x, **options).heads[0]


def check_mean(head, features: Tensor, dims: tuple[int, ...]) -> None:
    expected = head.classifier(features.mean(dims))
    torch.testing.assert_close(head(features), expected, rtol=1e-4, atol=1e-5)


IMAGES = torch.randn(2, 3, 24, 24)
#: (network, input, shape of other features for the same exit, dimensions that its head averages)
CASES = {
    "Conv1d, pooled by a layer": (
        Net(nn.Conv1d(2, 12, 7, 3), nn.ReLU(), nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten()),
            12),
        torch.randn(3, 2, 200), (4, 12, 9), (2,),
    ),
    "Conv1d, pooled by a function": (
        Net(nn.Conv1d(2, 12, 7, 3), nn.ReLU(), mean(2), 12),
        torch.randn(3, 2, 100), (4, 12, 9), (2,),
    ),
    "as many channels as steps": (
        Net(nn.Conv1d(2, 9, 4, 4), nn.ReLU(), mean(2), 9),
        torch.randn(3, 2, 36), (4, 9, 5), (2,),
    ),
    "as many channels as tokens": (
        Net(nn.Linear(6, 9), nn.GELU(), mean(1), 9),
        torch.randn(3, 9, 6), (4, 5, 9), (1,),
    ),
    "a recurrent layer reads tokens": (
        Net(nn.Embedding(30, 7), nn.Dropout(), nn.Sequential(
            nn.GRU(7, 8, batch_first=True), Lambda(lambda out: out[0][:, -1])), 8),
        torch.randint(30, (3, 11)), (4, 6, 7), (1,),
    ),
    "channels last, as many as rows and columns": (
        Net(nn.Sequential(nn.Conv2d(3, 6, 4, 4), turned(0, 2, 3, 1)), nn.LayerNorm(6), mean(1, 2),
            6),
        IMAGES, (2, 3, 4, 6), (1, 2),
    ),
    "channels last, no layer sees them": (
        Net(nn.Conv2d(3, 6, 4, 4), turned(0, 2, 3, 1), mean(1, 2), 6),
        IMAGES, (2, 3, 4, 6), (1, 2),
    ),
    "channels first, a norm turns them round": (
        Net(nn.Conv2d(3, 6, 4, 4), nn.ReLU(), nn.Sequential(Channels2d(6), mean(2, 3)), 6),
        IMAGES, (2, 6, 4, 3), (2, 3),
    ),
    "one size only, as many channels as rows and columns, a layer reads them": (
        Net(nn.Conv2d(3, 6, 4, 4), nn.ReLU(), nn.Sequential(
            nn.Conv2d(6, 2, 1), nn.Flatten(), nn.Linear(72, 6)), 6),
        IMAGES, (2, 6, 4, 3), (2, 3),
    ),
    "one size only, as many channels as tokens, a layer returns them": (
        Net(nn.Identity(), nn.Linear(5, 9), nn.Sequential(nn.Flatten(), nn.Linear(81, 6)), 6),
        torch.randn(3, 9, 5), (4, 5, 9), (1,),
    ),
    "the next layer mixes over frequencies": (
        Net(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Sequential(nn.Linear(16, 16), mean(2, 3)),
            8),
        torch.randn(2, 1, 12, 16), (2, 8, 5, 6), (2, 3),
    ),
    "the next layer mixes over steps": (
        Net(nn.Conv1d(1, 8, 3, padding=1), nn.ReLU(), nn.Sequential(nn.LayerNorm(16), mean(2)), 8),
        torch.randn(2, 1, 16), (2, 8, 5), (2,),
    ),
    "the next layer mixes over steps, as many as channels": (
        Net(nn.Conv1d(1, 8, 3, padding=1), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), mean(2)), 8),
        torch.randn(2, 1, 8), (2, 8, 5), (2,),
    ),
    "the next layer mixes over tokens": (
        Net(nn.Linear(5, 8), nn.GELU(), nn.Sequential(nn.BatchNorm1d(10), mean(1)), 8),
        torch.randn(2, 10, 5), (2, 7, 8), (1,),
    ),
    "one size only, layers see channels before and after turning them": (
        Net(nn.Sequential(nn.Flatten(), nn.Unflatten(1, (3, 24, 24)), nn.Conv2d(3, 6, 4, 4),
            turned(0, 2, 3, 1)), nn.Dropout(), nn.Sequential(nn.LayerNorm(6), mean(1, 2)), 6),
        IMAGES, (2, 3, 4, 6), (1, 2),
    ),
    "tall images": (
        Net(nn.Conv2d(3, 4, 2, 2), nn.ReLU(), mean(2, 3), 4),
        torch.randn(2, 3, 32, 8), (2, 4, 4, 4), (2, 3),
    ),
    "tall images, a width that looks like the height": (
        Net(nn.Conv2d(3, 16, 1, (8, 1)), nn.ReLU(), mean(2, 3), 16),
        torch.randn(2, 3, 32, 4), (2, 16, 4, 3), (2, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_heads_average_over_all_dimensions_but_the_channels(name):
    net, x, shape, dims = CASES[name]
    head = head_of(net, x)
    kept = ({1, 2, 3} - set(dims)).intersection(range(len(shape))).pop()
    assert head.classifier.in_features == shape[kept]
    check_mean(head, torch.randn(shape), dims)


def test_sequences_train_leave_and_are_copied():
    net, x, _, _ = CASES["Conv1d, pooled by a layer"]
    model = from_backbone(net, ["a"], C, example_input=x, thresholds=0.0)
    model.train()(x, torch.tensor([0, 1, 2])).loss.backward()
    assert model.heads[0].classifier.weight.grad.any()
    features = net.a(net.before(x)).mean(2)
    for twin in (model, copy.deepcopy(model), pickled(model)):
        out = twin.eval()(x)
        assert out.exit_index.tolist() == [0, 0, 0]
        torch.testing.assert_close(out.logits, model.heads[0].classifier(features))


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


class Fixed(nn.Module):
    """Features [N, 6, 6, 6] from images of one size only, without a layer that sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = nn.Identity(), nn.Linear(6, C)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x.reshape(-1, 3, 6, 6)[:, :1] * torch.ones(1, 6, 1, 1))
        return self.fc(x.reshape(-1, 6, 6, 6).mean((1, 2)))


FIXED = torch.randn(2, 3, 6, 6)


def test_a_layout_that_nothing_shows_is_asked_for():
    with pytest.raises(
        ValueError, match=r'^layout: expected NCHW or NHWC for "a", because .* None$'
    ):
        head_of(Fixed(), FIXED)
    for layout in ("NHWC", {"a": "NHWC"}):
        check_mean(head_of(Fixed(), FIXED, layout=layout), torch.randn(2, 4, 5, 6), (1, 2))
    check_mean(head_of(Fixed(), FIXED, layout="NCHW"), torch.randn(2, 6, 4, 5), (2, 3))


def test_a_layout_on_which_layers_differ_is_asked_for():
    """The exit mixes over frequencies and takes one number of them only."""
    net = Net(nn.Conv2d(1, 8, 3, padding=1), nn.Linear(16, 16), mean(2, 3), 8)
    with pytest.raises(ValueError, match='^layout: expected NCHW or NHWC for "a"'):
        head_of(net, torch.randn(2, 1, 12, 16))


def test_a_layout_that_is_given_wins():
    net, x, _, _ = CASES["as many channels as tokens"]
    check_mean(head_of(net, x, layout="NCL"), torch.randn(4, 9, 6), (2,))


@pytest.mark.parametrize(
    "layout, error, message",
    [
        (
            "NCL",
            ValueError,
            r"^layout: expected NCHW or NHWC for features \[2, 6, 6, 6\] .*\'NCL\'",
        ),
        ("nchw", ValueError, "^layout: expected NCHW or NHWC .* got 'nchw'"),
        ({"b": "NCHW"}, ValueError, r"^layout: expected names of exits, \['a'\], got 'b'"),
        (["NCHW"], TypeError, "^layout: expected one of NCL, NLC, NCHW, NHWC, a dict"),
        ({"a": 3}, ValueError, "^layout: expected NCHW or NHWC .* got 3"),
    ],
)
def test_wrong_layouts_are_named(layout, error, message):
    with pytest.raises(error, match=message):
        head_of(Fixed(), FIXED, layout=layout)


def test_vectors_have_no_layout():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, C))
    with pytest.raises(ValueError, match=r"^layout: expected none for features \[2, 4\]"):
        head_of(net, torch.randn(2, 3), exit="1", layout="NLC")
    assert head_of(net, torch.randn(2, 3), exit="1").classifier.in_features == 4


def test_looking_for_a_layout_changes_nothing():
    net, x, _, _ = CASES["channels last, no layer sees them"]
    net.train()
    hooks = [len(m._forward_hooks) for m in net.modules()]
    state = copy.deepcopy(net.state_dict())
    head_of(net, x)
    assert [len(m._forward_hooks) for m in net.modules()] == hooks and net.training
    torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)


def test_windows_of_swin_as_wide_as_their_channels():
    """torchvision's Swin with 24 channels on maps of 24 by 24."""
    swin = pytest.importorskip("torchvision.models").SwinTransformer(
        [2, 2], 24, [1, 1], [2, 2], [4, 4], num_classes=C
    )
    head = head_of(swin, torch.randn(1, 3, 48, 48), exit="features.1")
    check_mean(head, torch.randn(2, 12, 8, 24), (1, 2))
