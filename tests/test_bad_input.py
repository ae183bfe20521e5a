"""Wrong calls, each with the message it must give: the argument, what was expected, what came."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

import elf_fast
from elf_fast import ELF, ExitHead, losses, reference
from elf_fast import functional as F

Z = torch.randn(4, 5)
Y = torch.tensor([0, 1, 2, 3])
X = torch.randn(4, 6, 3, 3)
W, B = torch.randn(5, 6), torch.randn(5)
S = torch.tensor([0, 2])
nan, inf = math.nan, math.inf


def elf(stages=2, heads=2, cls=ELF, **options):
    return cls([nn.Identity()] * stages, [ExitHead(6, 5) for _ in range(heads)], **options)


class Pair(nn.Module):
    def forward(self, x):
        return x, x


def other_classes(cls, thresholds=inf):
    return cls([nn.Identity()] * 2, [ExitHead(6, 5), ExitHead(6, 4)], thresholds=thresholds)


GATE = [
    (lambda: F.exit_gate([1.0], 0.5), TypeError, "logits: expected a tensor, got [1.0] (list)"),
    (lambda: F.exit_gate(Z[0], 0.5), ValueError,
     "logits: expected shape [N, C] with C >= 1, got a float32 tensor of shape [5]"),
    (lambda: F.exit_gate(Z[:, :0], 0.5), ValueError, "logits: expected shape [N, C] with C >= 1"),
    (lambda: F.exit_gate(Z.long(), 0.5), TypeError,
     "logits: expected float32, float64, bfloat16 or float16, got a int64 tensor"),
    (lambda: F.exit_gate(Z, nan), ValueError,
     "threshold: expected values in [0, 1], or inf to switch an exit off "
     "(criterion 'confidence'), got nan"),
    (lambda: F.exit_gate(Z, 1.5), ValueError, "threshold: expected values in [0, 1]"),
    (lambda: F.exit_gate(Z, -inf), ValueError, "threshold: expected values in [0, 1]"),
    (lambda: F.exit_gate(Z, inf, criterion="entropy"), ValueError,
     "or -inf to switch an exit off (criterion 'entropy'), got inf"),
    (lambda: F.exit_gate(Z, torch.tensor([0.5, nan, 0.5, 0.5, 0.5])), ValueError,
     "threshold: expected values in [0, 1]"),
    (lambda: F.exit_gate(Z, torch.rand(4)), ValueError,
     "threshold: expected shape [] or [5], got a float32 tensor of shape [4]"),
    (lambda: F.exit_gate(Z, torch.rand(2, 5)), ValueError,
     "threshold: expected shape [] or [5], got a float32 tensor of shape [2, 5]"),
    (lambda: F.exit_gate(Z, torch.tensor(1)), TypeError,
     "threshold: expected a floating tensor, got a int64 tensor"),
    (lambda: F.exit_gate(Z, "0.5"), TypeError, "threshold: expected a number, got '0.5' (str)"),
    (lambda: F.exit_gate(Z, 0.5, temperature=0.0), ValueError,
     "temperature: expected positive finite numbers, got 0.0"),
    (lambda: F.exit_gate(Z, 0.5, temperature=torch.tensor(-1.0)), ValueError,
     "temperature: expected positive finite numbers, got -1.0"),
    (lambda: F.exit_gate(Z, 0.5, temperature=torch.rand(5)), ValueError,
     "temperature: expected shape [], got a float32 tensor of shape [5]"),
    (lambda: F.exit_gate(Z, 0.5, criterion="max"), ValueError,
     "criterion: expected one of confidence, margin, entropy, got 'max'"),
    (lambda: F.exit_gate(Z, 0.5, target=Y.float()), TypeError,
     "target: expected int64 class indices, got a float32 tensor of shape [4]"),
    (lambda: F.exit_gate(Z, 0.5, target=Y[:3]), ValueError,
     "target: expected shape [4], one per sample, got a int64 tensor of shape [3]"),
    (lambda: F.exit_gate(Z, 0.5, target=Y + 3), ValueError,
     "target: expected 0 <= target < 5 (the classes of the logits), got values from 3 to 6"),
    (lambda: F.exit_gate(Z, 0.5, target=Y - 1), ValueError, "got values from -1 to 2"),
    (lambda: F.exit_gate(Z, 0.5, target=Y.to("meta")), ValueError,
     "target: expected device cpu, got meta"),
]  # fmt: skip

LOSS = [
    (lambda: F.exit_loss(Z, None), TypeError, "target: expected a tensor, got None (NoneType)"),
    (lambda: F.exit_loss(Z, Y, weight=torch.rand(4)), ValueError,
     "weight: expected shape [5], one per class, got a float32 tensor of shape [4]"),
    (lambda: F.exit_loss(Z, Y, margins=torch.ones(5, dtype=torch.int64)), TypeError,
     "margins: expected a floating tensor"),
    (lambda: F.exit_loss(Z, Y, bias=[0.0] * 5), TypeError, "bias: expected a tensor"),
    (lambda: F.exit_loss(Z, Y, gamma=-1.0), ValueError,
     "gamma: expected a finite number >= 0.0, got -1.0"),
    (lambda: F.exit_loss(Z, Y, gamma="2"), TypeError, "gamma: expected a number, got '2' (str)"),
    (lambda: F.exit_loss(Z, Y, scale=0.0), ValueError,
     "scale: expected positive finite numbers, got 0.0"),
    (lambda: F.exit_loss(Z, Y, label_smoothing=1.5), ValueError,
     "label_smoothing: expected a number in [0.0, 1.0], got 1.5"),
    (lambda: losses.FocalLoss(-1.0), ValueError, "gamma: expected a finite number >= 0.0"),
    (lambda: losses.LDAMLoss([3, 0]), ValueError,
     "class_counts: expected [C] finite training counts of at least 1, got [3, 0] (list)"),
    (lambda: losses.LDAMLoss([3, math.inf]), ValueError, "class_counts: expected [C] finite train"),
    (lambda: losses.LDAMLoss([3, 1, 2]).margin_thresholds([[0.5, 0.6]]), ValueError,
     "thresholds: expected shape [], [E-1] or [E-1, 3], got [1, 2]"),
    (lambda: losses.LongTailLoss(weight=torch.ones(3), bias=torch.ones(4)), ValueError,
     "bias: expected shape [3], one per class, got a float32 tensor of shape [4]"),
    (lambda: losses.ClassBalancedLoss([3, 2], beta=1.0), ValueError,
     "beta: expected a number in [0, 1), got 1.0"),
    (lambda: losses.CrossEntropyLoss(reduction="sum"), ValueError,
     'reduction: expected "mean" or "none", got \'sum\''),
]  # fmt: skip

FEATURES = [
    (lambda: F.compact(torch.tensor(1.0), S), ValueError, "features: expected shape [N, ...]"),
    (lambda: F.compact(X, S.int()), TypeError, "survivors: expected int64 indices"),
    (lambda: F.compact(X, S[None]), ValueError,
     "survivors: expected shape [n] with n <= 4 samples, got a int64 tensor of shape [1, 2]"),
    (lambda: F.compact(X, torch.tensor([2, 0])), ValueError,
     "survivors: expected ascending indices in [0, 4), got [2, 0]"),
    (lambda: F.compact(X, torch.tensor([0, 0])), ValueError, "survivors: expected ascending"),
    (lambda: F.compact(X, torch.tensor([1, 4])), ValueError, "survivors: expected ascending"),
    (lambda: F.compact(X, torch.tensor([-1, 2])), ValueError, "survivors: expected ascending"),
    (lambda: F.compact_(X.clone().requires_grad_(), S), ValueError,
     "features: expected no gradient for compact_, got requires_grad=True"),
    (lambda: F.compact_(X[:, :, ::2], S), ValueError,
     "features: expected every sample dense in memory and no two"),
    (lambda: F.compact_(X[:1].expand(4, 6, 3, 3), S), ValueError, "features: expected every"),
    (lambda: F.exit_head(X[0, 0, 0], W, B, 0.5), ValueError,
     "features: expected shape [N, D], [N, T, D] or [N, D, H, W]"),
    (lambda: F.exit_head(X[:, :, :0], W, B, 0.5), ValueError, "with no empty dimension"),
    (lambda: F.exit_head(X.long(), W, B, 0.5), TypeError, "features: expected float32, float64"),
    (lambda: F.exit_head(X, W.T, B, 0.5), ValueError,
     "weight: expected shape [C, 6] to match the features, got a float32 tensor of shape [6, 5]"),
    (lambda: F.exit_head(X, W, B[:4], 0.5), ValueError,
     "bias: expected shape [5], got a float32 tensor of shape [4]"),
    (lambda: F.exit_head(X, W.to("meta"), None, 0.5), ValueError,
     "weight: expected device cpu, got meta"),
    (lambda: ExitHead(0, 5), ValueError, "in_features: expected a positive integer, got 0"),
    (lambda: ExitHead(6, 2.5), ValueError, "num_classes: expected a positive integer, got 2.5"),
]  # fmt: skip


def module_calls(cls):
    return [
        (lambda: cls([], []), ValueError, "stages: expected at least one module, got none"),
        (lambda: elf(2, 3, cls), ValueError, "heads: expected 2, one per stage, got 3 heads"),
        (lambda: cls(nn.Identity(), []), TypeError,
         "stages: expected a list of modules, got one Identity"),
        (lambda: cls([nn.Identity(), "conv"], []), TypeError,
         "stages[1]: expected an nn.Module, got 'conv' (str)"),
        (lambda: elf(cls=cls, thresholds=[0.5, 0.5]), ValueError,
         "thresholds: expected a scalar, 1 values (one per exit but the last) or [1, 5], "
         "got shape [2]"),
        (lambda: elf(cls=cls, thresholds=nan), ValueError, "thresholds: expected values in [0, 1]"),
        (lambda: elf(cls=cls, thresholds="high"), TypeError, "thresholds: expected a scalar"),
        (lambda: elf(cls=cls, train_thresholds=-0.1), ValueError,
         "train_thresholds: expected values in [0, 1]"),
        (lambda: elf(cls=cls, temperatures=0.0), ValueError,
         "temperatures: expected positive finite numbers, got 0.0"),
        (lambda: elf(cls=cls, temperatures=[1.0, 1.0]), ValueError,
         "temperatures: expected a scalar or 1 values"),
        (lambda: elf(cls=cls, criterion="softmax"), ValueError, "criterion: expected one of"),
        (lambda: elf(cls=cls, exit_loss=3), TypeError,
         "exit_loss: expected a callable (logits, target) -> losses [n], got 3 (int)"),
        (lambda: elf(cls=cls, exit_weights=[1.0]), ValueError,
         "exit_weights: expected a scalar or 2 values, got shape [1]"),
        (lambda: elf(cls=cls, exit_weights=None), TypeError,
         "exit_weights: expected a scalar or 2 values, got None (NoneType)"),
        (lambda: elf(cls=cls, exit_weights=-1.0), ValueError,
         "exit_weights: expected a finite number >= 0.0, got -1.0"),
        (lambda: elf(cls=cls)(3), TypeError, "x: expected a tensor, got 3 (int)"),
        (lambda: elf(cls=cls)(X, Y[:2]), ValueError, "target: expected shape [4], one per sample"),
        (lambda: elf(cls=cls)(X, Y.int()), TypeError, "target: expected int64 class indices"),
        (lambda: elf(cls=cls)(X, Y + 2), ValueError, "target: expected 0 <= target < 5"),
        (lambda: elf(cls=cls, thresholds=torch.rand(1, 7)).eval()(X), ValueError,
         "thresholds: expected a scalar, 1 values (one per exit but the last) or [1, 5], one per "
         "class, got shape [1, 7]"),
        (lambda: cls([nn.Identity()], [nn.Identity()])(X), ValueError,
         "heads[0]: expected logits of shape [4, C], got a float32 tensor of shape [4, 6, 3, 3]"),
        (lambda: cls([Pair(), nn.Identity()], [ExitHead(6, 5)] * 2)(X), TypeError,
         "stages[0]: expected to return a tensor, got (tensor([[[["),
        (lambda: cls([nn.Identity(), Pair()] * 2, [ExitHead(6, 5)] * 4, thresholds=inf)(X[:0]),
         TypeError, "stages[1]: expected to return a tensor, got (tensor([]"),
        (lambda: other_classes(cls)(X), ValueError,
         "heads[1]: expected logits of 5 classes, as the heads before it give, got 4"),
        (lambda: other_classes(cls).eval().requires_grad_(False)(X), ValueError, "heads[1]: expec"),
        (lambda: other_classes(cls, thresholds=0.3)(X, Y), ValueError, "heads[1]: expected logits"),
        (lambda: other_classes(cls)(X[:0]), ValueError, "heads[1]: expected logits of 5 classes"),
        (lambda: setattr(elf(cls=cls), "exit_loss", 3), TypeError,
         "exit_loss: expected a callable (logits, target) -> losses [n], got 3 (int)"),
        (lambda: elf(cls=cls, exit_loss=nn.CrossEntropyLoss())(X, Y), ValueError,
         'exit_loss: expected losses of shape [4], one per sample (reduction="none")'),
    ]  # fmt: skip


def compiled_in_place(change):
    model = elf()
    model.compile()
    return change(model)


OTHER = [
    (lambda: elf_fast.fuse(nn.Linear(2, 2)), ValueError,
     "model: expected an elf_fast.reference.ELF in it, got torch.nn.modules.linear.Linear"),
    (lambda: elf_fast.unfuse(elf(cls=reference.ELF)), ValueError,
     "model: expected an elf_fast.modules.ELF in it"),
    (lambda: elf_fast.fuse(3), TypeError, "model: expected an nn.Module, got 3 (int)"),
    (lambda: elf_fast.fuse(nn.Sequential(torch.compile(elf(cls=reference.ELF)))), ValueError,
     "model: expected the forward of its class, got a OptimizedModule whose forward torch.compile"),
    (lambda: compiled_in_place(elf_fast.unfuse), ValueError,
     "model: expected the forward of its class, got a ELF whose forward torch.compile"),
]  # fmt: skip

CALLS = GATE + LOSS + FEATURES + OTHER + module_calls(reference.ELF) + module_calls(ELF)


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_wrong_call(number):
    call, error, message = CALLS[number]
    with pytest.raises(error, match=re.escape(message)) as caught:
        call()
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_a_refused_call_changes_nothing():
    """compact_ with bad survivors leaves the features as they were."""
    x = X.clone()
    with pytest.raises(ValueError):
        F.compact_(x, torch.tensor([3, 1]))
    assert torch.equal(x, X)
