"""FLOPs do not depend on the kernel that serves, and what has no formula is named."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import flop_registry, register_flop_formula

from elf_fast import ELF, ExitHead
from elf_fast.flops import count_flops


class Call(nn.Module):
    """A function as a module, with the parameters that it needs."""

    def __init__(self, function, *parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(parameters)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.weights)


def flops(module: nn.Module, x: Tensor) -> int:
    """Of the module alone; nothing may be named in a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return count_flops(ELF([module], [nn.Identity()]), x).stages[0]


def names(module: nn.Module, x: Tensor) -> list[str]:
    """The texts of the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count_flops(ELF([module], [nn.Identity()]), x)
    return [str(w.message) for w in caught]


T, D, H = 7, 12, 3


class Attention(nn.Module):
    """Scaled dot products of H heads, by one function or by two matrix products."""

    def __init__(self, fused: bool, kv_heads: int = H) -> None:
        super().__init__()
        self.fused, self.kv_heads = fused, kv_heads

    def forward(self, x: Tensor) -> Tensor:
        q = x.view(1, -1, H, D // H).transpose(1, 2)
        k = q[:, : self.kv_heads]
        if self.fused:
            return F.scaled_dot_product_attention(q, k, k, enable_gqa=self.kv_heads != H)
        k = k.repeat_interleave(H // self.kv_heads, 1)
        return (q @ k.transpose(-2, -1)).softmax(-1) @ k


@pytest.mark.parametrize("kv_heads", [H, 1])
def test_attention_counts_two_products_whichever_kernel_serves(kv_heads):
    x = torch.randn(1, T, D)
    expected = 2 * (2 * T * T * D)
    assert flops(Attention(False, kv_heads), x) == expected
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH, None):
        if backend is None:
            assert flops(Attention(True, kv_heads), x) == expected
        elif kv_heads == H or backend is SDPBackend.MATH:
            with sdpa_kernel(backend):
                assert flops(Attention(True, kv_heads), x) == expected


def test_a_vision_transformer_of_timm():
    timm = pytest.importorskip("timm")
    options = dict(img_size=32, embed_dim=24, num_heads=2, depth=2, num_classes=3)
    counts = []
    for fused in (True, False):
        net = timm.create_model("vit_tiny_patch16_224", **options)
        for block in net.blocks:
            block.attn.fused_attn = fused
        counts.append(flops(net, torch.zeros(1, 3, 32, 32)))
    tokens, width = 5, 24
    block = 2 * tokens * width * (3 + 1 + 4 + 4) * width + 4 * tokens**2 * width
    assert counts == [2 * 4 * 3 * 16 * 16 * width + 2 * block + 2 * width * 3] * 2


@pytest.mark.parametrize("training", [True, False])
def test_transformer_layers_of_torch(training):
    """In evaluation PyTorch has one operator for the whole layer, if the heads are even."""
    layer = nn.TransformerEncoderLayer(D, 2, 20, batch_first=True).train(training)
    fast = torch.backends.mha.get_fastpath_enabled()
    expected = 2 * T * D * 4 * D + 4 * T * T * D + 2 * 2 * T * D * 20
    assert flops(layer, torch.randn(1, T, D)) == expected
    assert torch.backends.mha.get_fastpath_enabled() is fast


class First(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


@pytest.mark.parametrize("mkldnn", [True, False])
@pytest.mark.parametrize("layers, both", [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("kind, gates", [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers(kind, gates, layers, both, mkldnn):
    rnn = kind(D, 9, num_layers=layers, bidirectional=both, batch_first=True)
    directions = 1 + both
    matrices = gates * 9 * directions * (D + 9)
    matrices += gates * 9 * directions * (directions * 9 + 9) * (layers - 1)
    with torch.backends.mkldnn.flags(enabled=mkldnn):
        assert flops(First(rnn), torch.randn(1, T, D)) == 2 * T * matrices


def test_cells_and_products_with_vectors():
    assert flops(First(nn.LSTMCell(D, 9)), torch.randn(1, D)) == 2 * 4 * 9 * (D + 9)
    matrix, vector = torch.randn(4, D), torch.randn(D)
    assert flops(Call(lambda x, w: w @ x[0], matrix), torch.randn(1, D)) == 2 * 4 * D
    assert flops(Call(lambda x, v: x[0].dot(v), vector), torch.randn(1, D)) == 2 * D
    added = Call(lambda x, w, b: torch.addmv(b, w, x[0]), matrix, torch.randn(4))
    assert flops(added, torch.randn(1, D)) == 2 * 4 * D


def many(x: Tensor) -> Tensor:
    """Moves, compares and reduces data, and computes element by element."""
    y = torch.roll(F.pixel_shuffle(x, 2), 1, 2).unfold(2, 2, 2).flatten(2).sort(-1).values
    y = torch.where(y > 0, y, -y).cumsum(-1).topk(2).values.masked_fill(y[..., :2] < 1, 0)
    y = F.pad(y, (1, 1))[..., torch.tensor([0, 2])].repeat_interleave(2, 1).flip(1)
    return F.layer_norm(y, y.shape[-1:]).var(-1).log_softmax(-1).clamp(0, 1)


QUIET = [
    Call(many),
    nn.Sequential(nn.BatchNorm2d(4), nn.GELU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(3)),
    nn.Sequential(nn.GroupNorm(2, 4), nn.Dropout(), nn.Upsample(scale_factor=2, mode="bicubic")),
    nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.PReLU(4), nn.Softmax(1)),
    nn.Sequential(nn.InstanceNorm2d(4), nn.ChannelShuffle(2), nn.Unfold(2), nn.Hardswish()),
    Call(lambda x: F.grid_sample(x, torch.zeros(1, 2, 2, 2), align_corners=False)),
    Call(lambda x: torch.linalg.vector_norm(x, dim=1) + x.std() + torch.randn(8, 8)),
    Call(lambda x: F.embedding((x > 0).long().sum((1, 2, 3)) % 3, torch.eye(3))),
]


@pytest.mark.parametrize("module", QUIET, ids=range(len(QUIET)))
def test_what_is_no_product_counts_nothing_and_is_not_named(module):
    assert flops(module, torch.randn(1, 4, 8, 8)) == 0


@torch.library.custom_op("elf_fast_tests::scaled", mutates_args=())
def scaled(x: Tensor) -> Tensor:
    return x @ torch.eye(x.shape[1])


@torch.library.custom_op("elf_fast_tests::other", mutates_args=())
def other(x: Tensor) -> Tensor:
    return x * 3


@pytest.mark.parametrize(
    "function, named",
    [
        (lambda x: scaled(x), "elf_fast_tests.scaled"),
        (lambda x: torch.cdist(x, x), "aten._cdist_forward"),
        (lambda x: torch.fft.rfft(x).real, "aten._fft_r2c"),
        (lambda x: torch.linalg.inv(x.T @ x + torch.eye(D)), "aten.linalg_inv_ex"),
        (lambda x: F.bilinear(x, x, torch.ones(2, D, D)), "aten._trilinear"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_operators_without_a_formula_are_named(function, named):
    text = names(Call(function), torch.randn(1, D))
    assert len(text) == 1 and text[0].startswith(f"count_flops: no formula for {named}, which")


def test_all_names_come_in_one_warning():
    stages = [Call(scaled), nn.Sequential(Call(other), Call(scaled), nn.Linear(D, D))]
    model = ELF(stages, [ExitHead(D, 2), nn.Sequential(Call(other), ExitHead(D, 2))])
    message = "no formula for elf_fast_tests.other, elf_fast_tests.scaled, which"
    with pytest.warns(UserWarning, match=message) as w:
        counted = count_flops(model, torch.randn(1, D))
    assert len(w) == 1 and w[0].filename == __file__
    assert counted.stages == (0, 2 * D * D) and counted.heads == (2 * 2 * D, 2 * 2 * D)


def test_a_formula_that_the_user_registers_counts():
    operator = torch.ops.elf_fast_tests.scaled
    register_flop_formula(operator)(lambda shape, *, out_shape=None: math.prod(shape))
    try:
        assert flops(Call(scaled), torch.randn(1, D)) == D
    finally:
        del flop_registry[operator]
