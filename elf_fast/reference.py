"""ELF in plain PyTorch: the specification in code. Read this first.

ELF (Duggal et al., "ELF: An Early-Exiting Framework for Long-Tailed Classification",
arXiv 2006.11979) adds a classifier after every stage of a network; a sample leaves at the first
one that is sure of it, in training too, where it must also be right. Easy samples therefore stop
adding to the loss early, and hard ones, whatever their class, weigh more.

Everything here is written to be read. `elf_fast.functional` and `elf_fast.ELF` compute the same,
faster, and are tested against this file.

Shapes: N samples, C classes, D channels, E exits (exit E is the network's own classifier).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import checks, ranks
from .checks import CRITERIA

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
    confidence: Tensor  # [N] the criterion's statistic, float32 (float64 for float64 logits)
    prediction: Tensor  # [N] int64
    survivors: Tensor  # [n] int64, ascending: the samples that go on


class ExitHeadOutput(NamedTuple):
    logits: Tensor | None  # [N, C]; None where they were not asked for
    confidence: Tensor  # [N]
    prediction: Tensor  # [N] int64
    survivors: Tensor  # [n] int64


class ExitLoss(NamedTuple):
    loss: Tensor  # [N] per sample, float32 (float64 for float64 logits)
    confidence: Tensor  # [N]
    prediction: Tensor  # [N] int64
    survivors: Tensor  # [n] int64


class ELFOutput(NamedTuple):
    """What `ELF` returns, in input order: each sample's values at the exit it took."""

    logits: Tensor  # [N, C]
    prediction: Tensor  # [N] int64
    confidence: Tensor  # [N] float32
    exit_index: Tensor  # [N] int64, 0-based
    loss: Tensor | None  # [] or None without a target


def accumulated(x: Tensor) -> Tensor:
    """Arithmetic is float32, or float64 for float64 input."""
    return x if x.dtype == torch.float64 else x.float()


def statistic(logits: Tensor, temperature: float | Tensor = 1.0, criterion: str = "confidence"):
    """How sure a classifier is: [N] from logits [N, C], with p = softmax(logits / temperature).

    confidence: max p. margin: top-1 minus top-2 probability. entropy: -(sum p log p) / log C.
    Infinite logits follow softmax's limits: an infinite maximum takes all mass, evenly over ties.
    A NaN in a row gives NaN.
    """
    z = accumulated(logits) / temperature
    top = z.amax(dim=1, keepdim=True)
    if bool(top.isinf().any()):
        at_limit = torch.where(z == top, 0.0, -math.inf).to(z.dtype)
        z = torch.where(top.isinf(), at_limit, z)
    p = torch.softmax(z, dim=1)
    if criterion == "confidence":
        return p.amax(dim=1)
    if criterion == "margin":
        if p.shape[1] == 1:
            return p[:, 0]
        best = p.topk(2, dim=1).values
        return best[:, 0] - best[:, 1]
    if p.shape[1] == 1:
        return p[:, 0] * 0.0
    return torch.special.entr(p).sum(dim=1) / math.log(p.shape[1])


def statistic_grad(grad: Tensor, logits: Tensor, temperature: Tensor, criterion: str) -> Tensor:
    """Gradient [N, C] of `statistic` in the logits, from that in the statistic, grad [N].

    With s = softmax(logits / T): d max p / dz = p_top (e_top - s) / T, the margin's is the
    difference of two such terms, and dH/dz = -s (log s + H) / (T log C) for the entropy H.
    """
    C = logits.shape[1]
    log_s = torch.log_softmax(accumulated(logits) / temperature, dim=1)
    s = log_s.exp()
    if criterion == "entropy":
        entropy = torch.special.entr(s).sum(dim=1, keepdim=True)
        slope = -(s * (log_s + entropy)) / math.log(C) if C > 1 else torch.zeros_like(s)
    else:
        order = s.topk(min(2, C), dim=1).indices
        slope = torch.zeros_like(s)
        for k, sign in enumerate((1.0, -1.0)[: 1 if criterion == "confidence" else len(order.T)]):
            hit = F.one_hot(order[:, k], C)
            slope = slope + sign * s.gather(1, order[:, k, None]) * (hit - s)
    return (grad[:, None] * slope / temperature).to(logits.dtype)


def exit_gate(
    logits: Tensor,
    threshold: float | Tensor,
    *,
    temperature: float | Tensor = 1.0,
    criterion: str = "confidence",
    target: Tensor | None = None,
) -> ExitGate:
    """Which samples leave at an exit, by its logits [N, C].

    A sample leaves when its statistic is >= threshold (entropy: <=) and, where `target` [N] is
    given, its prediction is right. `threshold` is a scalar, or [C]: one per predicted class.
    A NaN never leaves; ties take the lowest class; inf (entropy: -inf) switches the exit off.
    """
    confidence = statistic(logits, temperature, criterion)
    prediction = logits.argmax(dim=1)
    if isinstance(threshold, Tensor) and threshold.dim() == 1:
        threshold = threshold[prediction]
    leaves = confidence <= threshold if criterion == "entropy" else confidence >= threshold
    if target is not None:
        leaves = leaves & (prediction == target)
    return ExitGate(confidence, prediction, (~leaves).nonzero().squeeze(1))


def pool(features: Tensor) -> Tensor:
    """[N, D] from features [N, D, H, W] (mean over positions), tokens [N, T, D] (mean over
    tokens) or [N, D] (as it is)."""
    if features.dim() == 4:
        return features.mean(dim=(2, 3))
    return features.mean(dim=1) if features.dim() == 3 else features


def exit_head(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: float | Tensor,
    *,
    temperature: float | Tensor = 1.0,
    criterion: str = "confidence",
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
    criterion: str = "confidence",
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
    x = adjusted(logits, target, margins, bias, scale)
    log_q = torch.log_softmax(x, dim=1)
    nll = -log_q.gather(1, target[:, None]).squeeze(1)
    loss = nll
    if label_smoothing > 0:
        loss = (1 - label_smoothing) * nll - label_smoothing * log_q.mean(dim=1)
    if gamma > 0:
        rest = -torch.expm1(-nll)  # 1 - p
        # At p = 1 the slope of a power below 1 is infinite; its product with a zero loss is not.
        loss = rest.clamp_min(torch.finfo(rest.dtype).tiny) ** gamma * loss
    if weight is not None:
        loss = weight[target] * loss
    if threshold is None:
        threshold = -math.inf if criterion == "entropy" else math.inf
    with torch.no_grad():
        gate = exit_gate(
            logits, threshold, temperature=temperature, criterion=criterion, target=target
        )
    return ExitLoss(loss, *gate)


class ExitHead(nn.Module):
    """An exit's classifier: global average pool (or token mean), then linear.

    Args:
        in_features: D, channels of the features [N, D, H, W], tokens [N, T, D] or vectors [N, D].
        num_classes: C.
        conv: put a 3x3 stride-2 convolution, BatchNorm and ReLU in front ([N, D, H, W] only). It
            lets the stage before keep features for the stages after, instead of classes.

    Shape: features -> logits [N, C].
    """

    def __init__(self, in_features: int, num_classes: int, *, conv: bool = False) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("num_classes", num_classes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        self.stem: nn.Module = nn.Identity()
        if conv:
            self.stem = nn.Sequential(
                nn.Conv2d(in_features, in_features, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(in_features),
                nn.ReLU(),
            )
        self.classifier = nn.Linear(in_features, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        return self.classifier(pool(self.stem(features)))


class ELF(nn.Module):
    """A network with early exits, in plain PyTorch.

    Args:
        stages: E modules; stage e maps features to features.
        heads: E modules; head e maps the features after stage e to logits [n, C].
        thresholds: a scalar, E-1 values, or [E-1, C]. Those of inference.
        train_thresholds: the same for training; None: as `thresholds`.
        temperatures: a scalar or E-1 values > 0; the tests read softmax(logits / temperature).
        criterion: "confidence", "margin" or "entropy"; see `statistic`.
        exit_loss: callable (logits [n, C], target [n]) -> losses [n], n >= 0, or a loss of
            `elf_fast.losses`, of which the arguments are read, whatever its reduction; None:
            cross-entropy.
        exit_weights: a scalar or E values w_k >= 0.
        drop_exited: whether training drops samples that left from the later stages, as evaluation
            always does, or keeps them in the forward pass with weight 0. Without batch statistics
            the two give the same gradients, but for random draws, and dropping is cheaper; with
            BatchNorm, keeping trained the more accurate networks (docs/accuracy.md). None: drop
            unless a later stage or head has a BatchNorm of torch's (or derived from it) that
            normalises by the batch. Other layers with batch statistics ask for False.

    Thresholds and temperatures are float32 buffers: saved, loaded and moved with the model, and
    never rounded to another dtype.

    forward(x, target=None) -> ELFOutput. A sample leaves at the first exit whose test it passes;
    in training with a target its prediction there must be right, too. With a target,
    loss = sum_i sum_{k <= e_i} w_k l(z_k, y_i) / N, over the exits up to the one sample i takes.

    In training inside `torch.nn.parallel.DistributedDataParallel`, N is that of the global batch
    and the loss is R times this rank's part of it, for R ranks: its mean over the ranks is the loss
    of the global batch and, where all hold equally many samples, it is the mean over this rank's
    own. Every rank enters every stage. One without survivors goes on with an empty batch, which the
    stages must accept. Where samples are dropped, SyncBatchNorm then has the statistics of all
    ranks' survivors, which padding would change, and BatchNorm, whose statistics are those of its
    own rank, leaves them alone. See docs/distributed.md.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """

    thresholds: Tensor
    train_thresholds: Tensor | None
    temperatures: Tensor

    def __init__(
        self,
        stages: Sequence[nn.Module],
        heads: Sequence[nn.Module],
        *,
        thresholds: float | Sequence[float] | Tensor = 0.9,
        train_thresholds: float | Sequence[float] | Tensor | None = None,
        temperatures: float | Sequence[float] | Tensor = 1.0,
        criterion: str = "confidence",
        exit_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        exit_weights: float | Sequence[float] = 1.0,
        drop_exited: bool | None = None,
    ) -> None:
        super().__init__()
        stages = checks.sequence_of_modules("stages", stages)
        heads = checks.sequence_of_modules("heads", heads)
        if not stages:
            raise ValueError("stages: expected at least one module, got none")
        if len(heads) != len(stages):
            raise ValueError(
                f"heads: expected {len(stages)}, one per stage, got {len(heads)} heads"
            )
        checks.criterion(criterion)
        if exit_loss is not None and not callable(exit_loss):
            raise TypeError(
                "exit_loss: expected a callable (logits, target) -> losses [n], "
                f"got {checks.describe(exit_loss)}"
            )
        self.stages = nn.ModuleList(stages)
        self.heads = nn.ModuleList(heads)
        self.criterion = criterion
        self.exit_loss = exit_loss
        self.drop_exited = drop_exited
        exits = len(stages) - 1
        self.exit_weights = _exit_weights(exit_weights, len(stages))
        self.register_buffer("thresholds", _thresholds("thresholds", thresholds, exits, criterion))
        self.register_buffer(
            "train_thresholds",
            None
            if train_thresholds is None
            else _thresholds("train_thresholds", train_thresholds, exits, criterion),
        )
        self.register_buffer("temperatures", _temperatures(temperatures, exits))

    def forward(self, x: Tensor, target: Tensor | None = None) -> ELFOutput:
        N = self._check_input(x, target)
        batch = ranks.batch_of(self, x)
        if N == 0:
            return self._forward_empty(x, target, batch)
        drop = self.drops_exited
        thresholds = self._active_thresholds()
        alive = torch.arange(N, device=x.device)  # [n] the samples that reach the current stage
        present: Tensor | None = None  # [n] their rows in x, where x holds others, too
        out: ELFOutput | None = None
        loss: Tensor | None = None
        for e, (stage, head) in enumerate(zip(self.stages, self.heads, strict=True)):
            x = stage(x)
            z = head(x)
            if present is not None:
                z = z[present]
            self._check_logits(z, e, len(alive))
            if e == 0 and target is not None:
                checks.target_range(target, z.shape[1])
            y = None if target is None else target[alive]
            last = e == len(self.stages) - 1
            gate = exit_gate(
                z,
                self._never if last else thresholds[e],
                temperature=1.0 if last else self.temperatures[e],
                criterion=self.criterion,
                target=y if self.training else None,
            )
            out = _write(out, alive, z, gate, e)
            if y is not None:
                losses = self._losses(z, y)
                loss = _add(loss, self.exit_weights[e] * losses.sum())
            if last:
                break
            observed = batch.observed(len(gate.survivors))
            if len(gate.survivors) == 0:
                if batch.shared:
                    _, zero = self._without_survivors(x, batch, e + 1, observed)
                    out, loss = _add_zero(out, loss, zero)
                break
            alive = alive[gate.survivors]
            if drop:
                rows = gate.survivors if present is None else present[gate.survivors]
                rows, present = self._rows_to_keep(rows, len(x), observed)
                x = compact(x, rows)
            else:
                present = alive
        assert out is not None
        return out._replace(loss=None if loss is None else batch.mean(loss))

    def _rows_to_keep(
        self, survivors: Tensor, rows: int, observed: int
    ) -> tuple[Tensor, Tensor | None]:
        """The rows [m] of x that go on, and where the survivors [n] then stand among them (None:
        they are all there is). In training a lone survivor, of all ranks under SyncBatchNorm, takes
        one exited sample along with weight 0: there are no statistics of a single value per
        channel."""
        if self.training and observed == 1 < rows:
            first = torch.zeros_like(survivors)
            return torch.cat([first, survivors.clamp_min(1)]), survivors.clamp_max(1)
        return survivors, None

    @property
    def drops_exited(self) -> bool:
        """Whether samples that left are dropped from the later stages, in the mode that the network
        is in: always in evaluation, by `drop_exited` in training."""
        if not self.training:
            return True
        if self.drop_exited is not None:
            return self.drop_exited
        return not any(
            isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
            for part in chain(self.stages[1:], self.heads[1:])
            for module in part.modules()
        )

    @property
    def _never(self) -> float:
        return -math.inf if self.criterion == "entropy" else math.inf

    def _active_thresholds(self) -> Tensor:
        if self.training and self.train_thresholds is not None:
            return self.train_thresholds
        return self.thresholds

    def _family(self) -> dict[str, Any] | None:
        """The arguments of `exit_loss` that stand for the loss; None: it is called."""
        if self.exit_loss is None:
            return {}
        as_family = getattr(self.exit_loss, "as_family", None)  # of elf_fast.losses
        return None if as_family is None else as_family()

    def _losses(self, z: Tensor, y: Tensor) -> Tensor:
        """Per-sample losses [n] in float32 at least."""
        family = self._family()
        if family is not None:
            return exit_loss(z, y, **family).loss
        assert self.exit_loss is not None
        losses = self.exit_loss(z, y)
        if not isinstance(losses, Tensor) or losses.shape != y.shape:
            raise ValueError(
                f"exit_loss: expected losses of shape [{len(y)}], one per sample "
                f'(reduction="none"), got {checks.describe(losses)}'
            )
        return accumulated(losses)

    def _check_input(self, x: Tensor, target: Tensor | None) -> int:
        checks.tensor("x", x)
        if x.dim() < 1:
            raise ValueError(f"x: expected a batch [N, ...], got {checks.describe(x)}")
        if target is not None:
            checks.target_shape(target, x.shape[0], x.device)
        return x.shape[0]

    def _check_logits(self, z: Any, e: int, rows: int) -> None:
        if not isinstance(z, Tensor) or z.dim() != 2 or z.shape[0] != rows:
            raise ValueError(
                f"heads[{e}]: expected logits of shape [{rows}, C], got {checks.describe(z)}"
            )
        self._check_classes(z.shape[1], e)

    def _check_classes(self, classes: int, e: int) -> None:
        for name in ("thresholds", "train_thresholds"):
            t = getattr(self, name)
            if t is not None and t.dim() == 2 and t.shape[1] != classes:
                raise ValueError(
                    f"{name}: expected [E-1, C] with C = {classes} (the classes of heads[{e}]), "
                    f"got {list(t.shape)}"
                )

    def _forward_empty(self, x: Tensor, target: Tensor | None, batch: ranks.Batch) -> ELFOutput:
        """N = 0: empty outputs and a zero loss that still backpropagates into every parameter."""
        z, zero = self._without_survivors(x, batch, 0, batch.entering())
        if target is not None:
            zero = zero + self._losses(z, target).sum()  # which may have parameters, too
        gate = exit_gate(z, self._never, criterion=self.criterion)
        out = _write(None, x.new_zeros(0, dtype=torch.int64), z, gate, 0)
        return out._replace(loss=None if target is None else batch.mean(zero))

    def _without_survivors(
        self, x: Tensor, batch: ranks.Batch, first: int, observed: int
    ) -> tuple[Tensor, Tensor]:
        """The stages from `first` on, where no sample of this process goes on: the last exit's
        logits [0, C], and a zero [] that backpropagates into every parameter on the way.

        x is empty, unless samples that left are kept and other ranks' samples, `observed` in
        number, are to be normalised together with those here.
        """
        drop = self.drops_exited
        zero = x.new_zeros((), dtype=torch.float32)
        for e in range(first, len(self.stages)):
            if drop or not observed:
                x = x[:0]
            with ranks.norms_at_rest(self, x, observed=observed) as x:
                x = self.stages[e](x)
                z = self.heads[e](x)
            self._check_logits(z, e, len(x))
            z = z[:0]
            zero = zero + z.sum()
            if observed and e < len(self.stages) - 1:
                observed = batch.observed(0)
        return z, zero

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ELF:
        exact = {
            name: getattr(self, name) for name in ("thresholds", "train_thresholds", "temperatures")
        }
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = getattr(self, name)
            if before is not None and not before.is_meta and after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def extra_repr(self) -> str:
        return (
            f"criterion={self.criterion!r}, thresholds={self.thresholds.tolist()}, "
            f"exit_weights={list(self.exit_weights)}, drop_exited={self.drop_exited}"
        )


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total + part


def _add_zero(out: ELFOutput, loss: Tensor | None, zero: Tensor) -> tuple[ELFOutput, Tensor | None]:
    """Whichever of the outputs is backpropagated reaches what `zero` [] does."""
    return out._replace(logits=out.logits + zero), None if loss is None else loss + zero


def _write(out: ELFOutput | None, rows: Tensor, z: Tensor, gate: Any, e: int) -> ELFOutput:
    """Exit e's values for the samples in `rows`; whoever goes on is overwritten at a later exit."""
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


def _values(name: str, value: Any, shape: str, dtype: torch.dtype = torch.float32) -> Tensor:
    try:
        t = torch.as_tensor(value, dtype=dtype).detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected {shape}, got {checks.describe(value)}") from error
    return t


def _thresholds(name: str, value: Any, exits: int, criterion: str) -> Tensor:
    shape = f"a scalar, {exits} values (one per exit but the last) or [{exits}, C]"
    t = _values(name, value, shape)
    if t.dim() == 0:
        t = t.expand(exits).clone()
    if t.dim() not in (1, 2) or t.shape[0] != exits:
        raise ValueError(f"{name}: expected {shape}, got shape {list(t.shape)}")
    checks.threshold_values(name, t, criterion)
    return t


def _temperatures(value: Any, exits: int) -> Tensor:
    shape = f"a scalar or {exits} values (one per exit but the last)"
    t = _values("temperatures", value, shape)
    if t.dim() == 0:
        t = t.expand(exits).clone()
    if t.dim() != 1 or t.shape[0] != exits:
        raise ValueError(f"temperatures: expected {shape}, got shape {list(t.shape)}")
    checks.positive("temperatures", t)
    return t


def _exit_weights(value: Any, exits: int) -> tuple[float, ...]:
    shape = f"a scalar or {exits} values"
    t = _values("exit_weights", value, shape, torch.float64)
    if t.dim() == 0:
        t = t.expand(exits)
    if t.dim() != 1 or t.shape[0] != exits:
        raise ValueError(f"exit_weights: expected {shape}, got shape {list(t.shape)}")
    for v in t.tolist():
        checks.at_least("exit_weights", v, 0.0)
    return tuple(t.tolist())
