"""ELF in plain PyTorch: the specification in code. Read this first.

ELF (Duggal et al., "ELF: An Early-Exiting Framework for Long-Tailed Classification",
arXiv 2006.11979) adds a classifier after every stage of a network; a sample leaves at the first
one that is sure of it. In training the prediction must also be right. Easy samples therefore stop
adding to the loss early, and hard samples of any class weigh more.

Everything here is written to be read. `elf_fast.functional` and `elf_fast.ELF` compute the same,
faster, and are tested against this file.

Shapes: N samples, C classes, D channels, E exits (exit E is the network's own classifier).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, criteria, ranks
from .base import ELFBase, ELFOutput, accumulated, apart_from
from .criteria import TABLE as CRITERIA
from .criteria import Criterion, Score
from .heads import ExitHead, pool

__all__ = [
    "CRITERIA",
    "ELF",
    "ELFOutput",
    "ExitGate",
    "ExitHead",
    "ExitHeadOutput",
    "ExitLoss",
    "compact",
    "exit_gate",
    "exit_head",
    "exit_loss",
    "pool",
    "statistic",
]


class ExitGate(NamedTuple):
    """What `exit_gate` returns."""

    confidence: Tensor  # [N] the criterion's statistic, float32 (float64 for float64 logits)
    prediction: Tensor  # [N] int64
    survivors: Tensor  # [n] int64, ascending: the samples that go on


class ExitHeadOutput(NamedTuple):
    """What `exit_head` returns."""

    logits: Tensor | None  # [N, C]; None where they were not asked for
    confidence: Tensor  # [N]
    prediction: Tensor  # [N] int64
    survivors: Tensor  # [n] int64


class ExitLoss(NamedTuple):
    """What `exit_loss` returns."""

    loss: Tensor  # [N] per sample, float32 (float64 for float64 logits)
    confidence: Tensor  # [N]
    prediction: Tensor  # [N] int64
    survivors: Tensor  # [n] int64


def statistic(
    logits: Tensor,
    temperature: float | Tensor = 1.0,
    criterion: str | Score | Criterion = "confidence",
) -> Tensor:
    """How sure a classifier is: [N] from logits [N, C], with p = softmax(logits / temperature).

    confidence: max p. margin: top-1 minus top-2 probability. entropy: -(sum p log p) / log C.
    Infinite logits follow softmax's limits: an infinite maximum takes all mass, evenly over ties.
    A callable gets logits / temperature and returns a score. A NaN in a row gives NaN.
    """
    criterion = criteria.find(criterion)
    z = accumulated(logits) / temperature
    if criterion.score is not None:
        return _score(criterion.score, z)
    top = z.amax(dim=1, keepdim=True)
    if bool(top.isinf().any()):
        at_limit = torch.where(z == top, 0.0, -math.inf).to(z.dtype)
        z = torch.where(top.isinf(), at_limit, z)
    return _formula(_STATISTICS, criterion)(torch.softmax(z, dim=1))


def _confidence(p: Tensor) -> Tensor:
    return p.amax(dim=1)


def _margin(p: Tensor) -> Tensor:
    if p.shape[1] == 1:
        return p[:, 0]
    best = p.topk(2, dim=1).values
    return best[:, 0] - best[:, 1]


def _entropy(p: Tensor) -> Tensor:
    if p.shape[1] == 1:
        return p[:, 0] * 0.0
    return torch.special.entr(p).sum(dim=1) / math.log(p.shape[1])


def _score(score: Score, z: Tensor) -> Tensor:
    """A user's score [N] of z [N, C], which must be finite so that inf switches an exit off."""
    value = score(z)
    if not isinstance(value, Tensor) or value.shape != z.shape[:1]:
        raise ValueError(
            f"criterion: expected scores of shape [{len(z)}], one per sample, from the callable, "
            f"got {checks.describe(value)}"
        )
    limits = torch.finfo(z.dtype)
    value = value.to(z.dtype).clamp(limits.min, limits.max)
    return torch.where(z.isnan().any(dim=1), math.nan, value)


def statistic_grad(grad: Tensor, logits: Tensor, temperature: Tensor, criterion: Criterion):
    """Gradient [N, C] of `statistic` in the logits, from that in the statistic, grad [N].

    With s = softmax(logits / T): d max p / dz = p_top (e_top - s) / T, the margin's is the
    difference of two such terms, and dH/dz = -s (log s + H) / (T log C) for the entropy H.
    """
    log_s = torch.log_softmax(accumulated(logits) / temperature, dim=1)
    slope = _formula(_SLOPES, criterion)(log_s)
    return (grad[:, None] * slope / temperature).to(logits.dtype)


def _probability_slope(s: Tensor, at: Tensor) -> Tensor:
    """Gradient [N, C] of the probabilities of the classes `at` [N] in logits / T."""
    return s.gather(1, at[:, None]) * (F.one_hot(at, s.shape[1]) - s)


def _confidence_slope(log_s: Tensor) -> Tensor:
    s = log_s.exp()
    return _probability_slope(s, s.argmax(dim=1))


def _margin_slope(log_s: Tensor) -> Tensor:
    s = log_s.exp()
    if s.shape[1] == 1:
        return _probability_slope(s, s.argmax(dim=1))
    first, second = s.topk(2, dim=1).indices.T
    return _probability_slope(s, first) - _probability_slope(s, second)


def _entropy_slope(log_s: Tensor) -> Tensor:
    s, C = log_s.exp(), log_s.shape[1]
    entropy = torch.special.entr(s).sum(dim=1, keepdim=True)
    return -(s * (log_s + entropy)) / math.log(C) if C > 1 else torch.zeros_like(s)


#: By a criterion's name: the statistic of p [N, C], and its gradient from log p.
_STATISTICS = {"confidence": _confidence, "margin": _margin, "entropy": _entropy}
_SLOPES = {"confidence": _confidence_slope, "margin": _margin_slope, "entropy": _entropy_slope}


def _formula(formulas: Mapping[str, Callable[[Tensor], Tensor]], criterion: Criterion):
    if criterion.name not in formulas:
        raise ValueError(
            f"criterion: expected one of {', '.join(formulas)}, which have a formula in "
            f"reference.py, got {criterion.name!r}"
        )
    return formulas[criterion.name]


def exit_gate(
    logits: Tensor,
    threshold: float | Tensor,
    *,
    temperature: float | Tensor = 1.0,
    criterion: str | Score | Criterion = "confidence",
    target: Tensor | None = None,
) -> ExitGate:
    """Which samples leave at an exit, by its logits [N, C].

    A sample leaves when its statistic is >= threshold (entropy: <=) and, where `target` [N] is
    given, its prediction is right. `threshold` is a scalar, or [C]: one per predicted class.
    A NaN never leaves; ties take the lowest class; inf (entropy: -inf) switches the exit off.
    """
    criterion = criteria.find(criterion)
    confidence = statistic(logits, temperature, criterion)
    prediction = logits.argmax(dim=1)
    if isinstance(threshold, Tensor) and threshold.dim() == 1:
        threshold = threshold[prediction]
    leaves = criterion.passes(confidence, threshold)
    if target is not None:
        leaves = leaves & (prediction == target)
    return ExitGate(confidence, prediction, (~leaves).nonzero().squeeze(1))


def exit_head(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: float | Tensor,
    *,
    temperature: float | Tensor = 1.0,
    criterion: str | Score | Criterion = "confidence",
    target: Tensor | None = None,
) -> ExitHeadOutput:
    """Pool, classify with weight [C, D] and bias [C], and gate."""
    logits = F.linear(pool(features).to(weight.dtype), weight, bias)
    gate = exit_gate(logits, threshold, temperature=temperature, criterion=criterion, target=target)
    return ExitHeadOutput(logits, *gate)


def compact(features: Tensor, survivors: Tensor) -> Tensor:
    """The survivors' rows [n, ...] of features [N, ...], in order."""
    return features.index_select(0, survivors)


def adjusted(
    logits: Tensor, target: Tensor, margins: Tensor | None, bias: Tensor | None, scale: float
) -> Tensor:
    """x [N, C] = scale * (logits - margins_y e_y) + bias, the logits that `exit_loss` reads."""
    x = accumulated(logits)
    if margins is not None:
        x = x - margins[target, None] * F.one_hot(target, logits.shape[1])
    x = scale * x
    return x if bias is None else x + bias


def family_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    margins: Tensor | None,
    bias: Tensor | None,
    gamma: float,
    scale: float,
    label_smoothing: float,
) -> Tensor:
    """The losses [N] of `exit_loss`, without the gate."""
    x = adjusted(logits, target, margins, bias, scale)
    log_q = torch.log_softmax(x, dim=1)
    nll = -log_q.gather(1, target[:, None]).squeeze(1)
    loss = nll
    if label_smoothing > 0:
        loss = (1 - label_smoothing) * nll - label_smoothing * log_q.mean(dim=1)
    if gamma > 0:
        rest = -torch.expm1(-nll)  # 1 - p
        # At p = 1 and gamma < 1 the slope of the power is infinite; its product with a loss of 0
        # must be 0, not NaN.
        loss = rest.clamp_min(torch.finfo(rest.dtype).tiny) ** gamma * loss
    return loss if weight is None else weight[target] * loss


def exit_loss(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    gamma: float = 0.0,
    scale: float = 1.0,
    margins: Tensor | None = None,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    threshold: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    criterion: str | Score | Criterion = "confidence",
) -> ExitLoss:
    """The long-tail loss family, per sample, with the gate on the same logits [N, C].

    With x = scale * (logits - margins_y e_y) + bias, q = softmax(x), p = q_y and eps the label
    smoothing:

        loss = weight_y * (1 - p)^gamma * ((1 - eps) * -log p + eps * mean_c(-log q_c))

    gamma > 0 is the focal loss (Lin et al., arXiv 1708.02002, eq. 4); weight the class-balanced
    one (Cui et al., arXiv 1901.05555, eq. 3); margins and scale LDAM (Cao et al.,
    arXiv 1906.07413, eq. 13); bias = log prior balanced softmax (Ren et al., arXiv 2007.10740,
    eq. 4) or, times tau, logit adjustment (Menon et al., arXiv 2007.07314, eq. 10).
    The gate reads `logits`, not x. threshold None: no sample leaves.
    """
    family = (weight, margins, bias, gamma, scale, label_smoothing)
    loss = family_loss(logits, target, *family)
    if threshold is None:
        threshold = criteria.find(criterion).off
    with torch.no_grad():
        gate = exit_gate(
            logits, threshold, temperature=temperature, criterion=criterion, target=target
        )
    return ExitLoss(loss, *gate)


class ELF(ELFBase):
    """A network with early exits, in plain PyTorch.

    Args:
        stages: E modules; stage e maps features to features, and may write into its input, which
            for the first is the caller's batch. A stage that keeps what it returns should keep a
            copy: without gradients the next one may write into it.
        heads: E modules; head e maps the features after stage e to logits [n, C], with one C.
        thresholds: a scalar, E-1 values, or [E-1, C], one per predicted class. Used at inference.
        train_thresholds: the same for training; None: as `thresholds`.
        temperatures: a scalar or E-1 values > 0; the tests read softmax(logits / temperature).
        criterion: "confidence", "margin" or "entropy" (see `statistic`), or a callable
            (logits [n, C]) -> score [n] whose larger scores are surer. It gets the logits divided
            by the temperature, and no fused kernel computes it.
        exit_loss: callable (logits [n, C], target [n]) -> losses [n], n >= 0, or a loss of
            `elf_fast.losses`, whose arguments are used and whose reduction is ignored; None:
            cross-entropy.
        exit_weights: a scalar or E values w_k >= 0.
        drop_exited: whether training drops samples that left from the later stages, as evaluation
            does, or keeps them in the forward pass with weight 0. Without batch statistics
            the two give the same gradients, but for random draws, and dropping is cheaper; with
            BatchNorm, keeping trained the more accurate networks (docs/accuracy.md). None: drop
            unless a later stage or head has a BatchNorm of torch's (or derived from it) that
            normalises by the batch. If other layers use batch statistics, pass False. Evaluation
            keeps them only for a later BatchNorm without running statistics (looked for by the
            constructor and by `train()` and `eval()`). A stage that no sample reaches updates no
            running statistics either way. Switch the exits off for
            `torch.optim.swa_utils.update_bn`, which passes no target.

    Thresholds and temperatures are float32 buffers: saved, loaded and moved with the model, and
    never rounded to another dtype. Assigned and loaded values are checked and converted like
    arguments, so `model.thresholds = 0.8` works. Values [E-1] also load into [E-1, C] and back.
    Values that reach the buffers in another way, in place or by `torch.func.functional_call`, are
    not checked. A threshold of NaN switches its exit off and reads as inf (entropy: -inf): tools
    that average models average buffers, too, and inf - inf is NaN.

    forward(x, target=None) -> ELFOutput. A sample leaves at the first exit whose test it passes;
    in training with a target its prediction there must be right, too. With a target,
    loss = sum_i sum_{k <= e_i} w_k l(z_k, y_i) / N, over the exits up to the one sample i takes.

    In training inside `torch.nn.parallel.DistributedDataParallel` with R ranks, N is the size of
    the global batch, and the loss is R times this rank's part of the global sum: DDP averages over
    ranks, so the result is the gradient of the global loss. If all ranks hold equally many samples,
    the loss is the mean over this rank's own. Every rank runs every stage, because collectives must
    match; a rank without survivors runs an empty batch, which the stages must accept. See
    docs/distributed.md.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """

    def forward(self, x: Tensor, target: Tensor | None = None) -> ELFOutput:
        N = self._check_input(x, target)
        batch = ranks.batch_of(self, x)
        if N == 0:
            return self._forward_empty(x, target, batch)
        drop, given = self.drops_exited, x
        criterion = self._active_criterion()
        thresholds = [*self._active_thresholds(), criterion.off]
        temperatures = [*self.temperatures, 1.0]
        alive = torch.arange(N, device=x.device)  # [n] the samples that reach the current stage
        present: Tensor | None = None  # [n] their rows in x, if x holds other samples too
        out: ELFOutput | None = None
        loss: Tensor | None = None
        for e, (stage, head) in enumerate(zip(self.stages, self.heads, strict=True)):
            x = stage(x)
            self._check_features(x, e)
            if e == 0:
                x = apart_from(given, x)
            z = head(x)
            if present is not None:
                z = z[present]
            self._check_logits(z, e, len(alive))
            self._check_classes(z.shape[1], e, None if out is None else out.logits.shape[1])
            if e == 0 and target is not None:
                checks.target_range(target, z.shape[1])
            y = None if target is None else target[alive]
            gate = exit_gate(
                z,
                thresholds[e],
                temperature=temperatures[e],
                criterion=criterion,
                target=y if self.training else None,
            )
            out = _written(out, alive, z, gate, e)
            if y is not None:
                at_this_exit = self.exit_weights[e] * self._losses(z, y).sum()
                loss = at_this_exit if loss is None else loss + at_this_exit
            if e == len(self.stages) - 1:
                break
            n = len(gate.survivors)
            reaching = batch.reaching(n)  # over all ranks, where they normalise together
            if n == 0:
                out, loss = self._join_other_ranks(out, loss, x, batch, e + 1, reaching)
                break
            alive = alive[gate.survivors]
            if drop:
                rows = gate.survivors if present is None else present[gate.survivors]
                rows, present = self._rows_to_keep(rows, len(x), reaching)
                x = compact(x, rows)
            else:
                present = alive
                x = x.clone()  # because the next stage may write into it
        assert out is not None
        return out._replace(loss=None if loss is None else batch.mean(loss))

    def _losses(self, z: Tensor, y: Tensor) -> Tensor:
        family = self._family()
        return self._called_loss(z, y) if family is None else exit_loss(z, y, **family).loss


def _written(out: ELFOutput | None, rows: Tensor, z: Tensor, gate: ExitGate, e: int) -> ELFOutput:
    """Exit e's values for the samples in `rows`. A later exit overwrites those of survivors."""
    if out is None:
        exit_index = torch.zeros_like(rows)
        return ELFOutput(z, gate.prediction, gate.confidence.detach().float(), exit_index, None)
    return ELFOutput(
        out.logits.index_copy(0, rows, z.to(out.logits.dtype)),
        out.prediction.index_copy(0, rows, gate.prediction),
        out.confidence.index_copy(0, rows, gate.confidence.detach().float()),
        out.exit_index.index_fill(0, rows, e),
        None,
    )
