"""`ELF`, the drop-in for `reference.ELF` that runs on the fused operators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from . import checks, functional, ops, ranks, reference
from .arguments import call, class_vectors, cpu_scalars, in_arithmetic_of
from .base import ELFBase, ELFOutput, apart_from, writable
from .criteria import Criterion
from .heads import ExitHead

__all__ = ["ELF", "ELFOutput", "ExitHead", "fuse", "is_fusable", "unfuse"]


class _Test(NamedTuple):
    """The settings of one exit's test, as ELF stores them."""

    threshold: Tensor  # [] or [C]
    temperature: Tensor  # []
    criterion: Criterion
    is_last: bool


class _Exit(NamedTuple):
    """One exit's results for the n samples that reach it."""

    logits: Tensor  # [n, C]
    confidence: Tensor  # [n]
    prediction: Tensor  # [n]
    survivors: Tensor  # [n]; only the first `survivor_count` are survivors
    survivor_count: Tensor  # []
    losses: Tensor | None = None  # [n] or None without a target
    #: Whether the user's code may hold the logits: the user's own head returned them.
    logits_are_shared: bool = True


class _Samples:
    """The samples of the batch that reach the current stage, and their rows in its features."""

    def __init__(self, N: int, target: Tensor | None) -> None:
        self.n = N
        #: [n] their indices in the batch; None: all of them.
        self.alive: Tensor | None = None
        #: [n] their rows in the features, if those hold other samples too.
        self.present: Tensor | None = None
        #: C, once an exit has given logits.
        self.classes: int | None = None
        #: [n] their targets.
        self.target = None if target is None else target.contiguous()
        if target is not None and target.is_inference() and torch.is_grad_enabled():
            self.target = target.clone()  # autograd saves no tensor made in inference mode

    def narrow(self, survivors: Tensor) -> None:
        """Keeps only the survivors [n], given as indices into the current samples."""
        self.n = survivors.shape[0]
        alive, y = self.alive, self.target
        self.alive = survivors if alive is None else alive.index_select(0, survivors)
        self.target = None if y is None else y.index_select(0, survivors)


class ELF(ELFBase):
    """A network with early exits, on fused kernels: same arguments, `state_dict` and results as
    `reference.ELF` (see there), faster.

    At every exit one kernel does softmax, test and survivor indices. Without a target it also does
    pool and classifier of an `ExitHead`; in training, the loss of the long-tail family. If samples
    are dropped, survivors move into a dense batch, so that the later stages compute on them alone.

    torch.compile breaks the graph at every exit, where the number of survivors is read.
    torch.export and torch.jit.trace need one graph and fail there.

    Examples:
        >>> model = ELF([nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)],
        ...             [ExitHead(8, 10), ExitHead(8, 10)], thresholds=0.9)
        >>> out = model.eval()(torch.randn(4, 3, 8, 8))
        >>> out.logits.shape, out.exit_index.shape
        (torch.Size([4, 10]), torch.Size([4]))
    """

    def forward(self, x: Tensor, target: Tensor | None = None) -> ELFOutput:
        N = self._check_input(x, target)
        batch = ranks.batch_of(self, x)
        if N == 0:
            return self._forward_empty(x, target, batch)
        drop = self.drops_exited
        samples, given = _Samples(N, target), x
        out: ELFOutput | None = None
        loss: Tensor | None = None
        overwritten: list[Tensor] = []  # logits [N, C] of exits where nobody left
        parts = zip(self.stages, self.heads, self._tests(), strict=True)
        for e, (stage, head, test) in enumerate(parts):
            x = stage(x)
            self._check_features(x, e)
            if e == 0:
                x = apart_from(given, x)
            result = self._exit(e, head, x, samples, test)
            n = 0 if test.is_last else int(result.survivor_count)
            if n < 0:
                checks.target_range(samples.target, result.logits.shape[1])
            if e == 0:
                dtype, samples.classes = result.logits.dtype, result.logits.shape[1]
            # If no sample leaves, a later exit overwrites every row, but backward needs this one.
            if n < samples.n or torch.is_grad_enabled():
                if out is not None and samples.alive is None:
                    overwritten.append(out.logits)
                out = _written(out, samples.alive, result, e, dtype)
            if result.losses is not None:
                at_this_exit = self.exit_weights[e] * result.losses.sum()
                loss = at_this_exit if loss is None else loss + at_this_exit
            if test.is_last:
                break
            reaching = batch.reaching(n)
            if n == 0:
                assert out is not None
                out, loss = self._join_other_ranks(out, loss, x, batch, e + 1, reaching)
                break
            x = self._for_next_stage(x, result.survivors, n, samples, drop, reaching)
        assert out is not None
        if overwritten and any(z.requires_grad for z in (*overwritten, out.logits)):
            # Every exit that ran takes part in a backward pass from the logits, with gradient 0.
            out = out._replace(logits=torch.stack([*overwritten, out.logits])[-1])
        return out._replace(loss=None if loss is None else batch.mean(loss))

    def _tests(self) -> Iterator[_Test]:
        """One per exit, made when it is reached. The last exit's threshold keeps every sample."""
        criterion = self._active_criterion()
        thresholds, temperatures = self._active_thresholds(), self.temperatures
        for t, T in zip(thresholds.unbind(0), temperatures.unbind(0), strict=True):
            yield _Test(t, T, criterion, False)
        never, one = cpu_scalars(criterion.off, 1.0)
        yield _Test(never, one, criterion, True)

    def _for_next_stage(
        self, x: Tensor, survivors: Tensor, n: int, samples: _Samples, drop: bool, reaching: int
    ) -> Tensor:
        """The features for the next stage. The first n survivors are indices into the samples."""
        if n < samples.n:
            survivors = survivors[:n]
            samples.narrow(survivors)
            if drop:
                # x holds exactly the samples: `_rows_to_keep` adds one only to a last one.
                keep, samples.present = self._rows_to_keep(survivors, x.shape[0], reaching)
                return call(ops.compact, (x,), (x, keep))
            samples.present = samples.alive
        return writable(x)

    def _exit(self, e: int, head: nn.Module, x: Tensor, samples: _Samples, test: _Test) -> _Exit:
        """Logits, gate and losses at exit e, with as few kernels as possible."""
        y = samples.target
        whole = y is None and samples.present is None and test.criterion.score is None
        if whole and isinstance(head, ExitHead) and is_fusable(head):
            return self._fused_head(e, head, x, samples, test)
        z = head(x)
        if samples.present is not None:
            z = z[samples.present]
        self._check_logits(z, e, samples.n)
        self._check_classes(z.shape[1], e, samples.classes)
        checks.logits(z)
        if test.criterion.score is not None:
            gate = _unfused_gate(z, y if self.training else None, test)
            return gate._replace(losses=None if y is None else self._losses(z, y))
        family = self._family()
        if y is not None and self.training and family is not None:
            return _fused_loss(z, y, family, test)
        gate = _fused_gate(z, y if self.training else None, test)
        return gate._replace(losses=None if y is None else self._losses(z, y))

    def _fused_head(
        self, e: int, head: ExitHead, x: Tensor, samples: _Samples, test: _Test
    ) -> _Exit:
        features = head.stem(x)
        checks.poolable(features)
        weight, bias = head.classifier.weight, head.classifier.bias
        checks.classifier(weight, bias, features.shape[2 if features.dim() == 3 else 1])
        self._check_classes(weight.shape[0], e, samples.classes)
        t, T = in_arithmetic_of(weight, test.threshold, test.temperature)
        z, _, confidence, prediction, survivors, count = call(
            ops.exit_head,
            (features, weight, bias),
            (features, weight, bias, t, T, test.criterion.code, None, not test.is_last, True),
        )
        self._check_logits(z, e, samples.n)
        return _Exit(z, confidence, prediction, survivors, count, logits_are_shared=False)

    def _losses(self, z: Tensor, y: Tensor) -> Tensor:
        family = self._family()
        if family is None:
            return self._called_loss(z, y)
        return functional.exit_loss(z, y, **family).loss


def _fused_gate(z: Tensor, target: Tensor | None, test: _Test) -> _Exit:
    t, T = in_arithmetic_of(z, test.threshold, test.temperature)
    # A later exit overwrites the confidence of a sample that goes on, so the kernel may stop early.
    gate = call(
        ops.exit_gate,
        (),
        (z, t, T, test.criterion.code, target, not test.is_last),
        lambda: checks.target_range(target, z.shape[1]),
    )
    return _Exit(z, *gate)


def _fused_loss(z: Tensor, y: Tensor, family: dict[str, Any], test: _Test) -> _Exit:
    names = ("weight", "margins", "bias")
    vectors = class_vectors(z, **{name: family.get(name) for name in names})
    t, T = in_arithmetic_of(z, test.threshold, test.temperature)
    losses, _, confidence, prediction, survivors, count = call(
        ops.exit_loss,
        (z,),
        (z, y, *vectors, family.get("gamma", 0.0), family.get("scale", 1.0),
         family.get("label_smoothing", 0.0), t, T, test.criterion.code),
        lambda: checks.target_range(y, z.shape[1]),
    )  # fmt: skip
    return _Exit(z, confidence, prediction, survivors, count, losses)


def _unfused_gate(z: Tensor, target: Tensor | None, test: _Test) -> _Exit:
    """The gate for a user's own criterion, which no kernel computes."""
    checks.target_range(target, z.shape[1])
    with torch.no_grad():
        gate = reference.exit_gate(
            z,
            test.threshold,
            temperature=test.temperature,
            criterion=test.criterion,
            target=target,
        )
    count = torch.scalar_tensor(len(gate.survivors), dtype=torch.int64, device="cpu")
    return _Exit(z, gate.confidence, gate.prediction, gate.survivors, count)


def _written(
    out: ELFOutput | None, alive: Tensor | None, r: _Exit, e: int, dtype: torch.dtype
) -> ELFOutput:
    """As in the reference, but in place unless a gradient forbids it. dtype: of the logits."""
    confidence = r.confidence
    if torch.is_grad_enabled():
        confidence = confidence.detach()
    if confidence.dtype != torch.float32:
        confidence = confidence.float()
    if out is None or alive is None:
        # A copy, because later exits write into these logits, which may be the user's tensor.
        copy = r.logits_are_shared and not torch.is_grad_enabled()
        logits = r.logits.to(dtype, copy=copy)
        exit_index = torch.full_like(r.prediction, e)
        return ELFOutput(logits, r.prediction, confidence, exit_index, None)
    z = r.logits.to(dtype)
    return ELFOutput(
        out.logits.index_copy(0, alive, z)
        if torch.is_grad_enabled()
        else out.logits.index_copy_(0, alive, z),
        out.prediction.index_copy_(0, alive, r.prediction),
        out.confidence.index_copy_(0, alive, confidence),
        out.exit_index.index_fill_(0, alive, e),
        None,
    )


_LINEAR, _HEAD = nn.Linear.forward, ExitHead.forward
_GLOBAL_HOOKS = (
    _module._global_forward_hooks,
    _module._global_forward_pre_hooks,
    _module._global_backward_hooks,
    _module._global_backward_pre_hooks,
)


def is_fusable(head: nn.Module) -> bool:
    """Whether an ExitHead is as its class defines it: nothing that a user added is passed over."""
    classifier = head.classifier
    return (
        type(head) is ExitHead
        and type(classifier) is nn.Linear
        and not _is_changed(head)
        and not _is_changed(classifier)
        and ExitHead.forward is _HEAD
        and nn.Linear.forward is _LINEAR
        and not any(_GLOBAL_HOOKS)
    )


def _is_changed(module: nn.Module) -> bool:
    """Whether a module has hooks, or a `forward` that was set on it."""
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _recast(model: nn.Module, source: type[nn.Module], to: type[nn.Module]) -> nn.Module:
    """A model that shares every submodule, parameter and buffer with `model`, except that modules
    of type `source`, at any depth, become `to`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {checks.describe(model)}")
    if not any(type(module) is source for module in model.modules()):
        raise ValueError(
            f"model: expected an {source.__module__}.{source.__qualname__} in it, "
            f"got {type(model).__module__}.{type(model).__qualname__} without one"
        )
    return _recast_tree(model, source, to, {})


def _recast_tree(
    model: nn.Module,
    source: type[nn.Module],
    to: type[nn.Module],
    twins: dict[nn.Module, nn.Module],
) -> nn.Module:
    """twins: the modules that are done; one that occurs twice stays one."""
    if model in twins:
        return twins[model]
    if not any(type(module) is source for module in model.modules()):
        return model
    if "forward" in vars(model) or vars(model).get("_compiled_call_impl") is not None:
        raise ValueError(
            f"model: expected the forward of its class, got a {type(model).__name__} whose forward "
            "torch.compile or an assignment replaced; it would still run the old network"
        )
    twin = twins[model] = model.__new__(to if type(model) is source else type(model))
    twin.__dict__ = {
        key: value.copy() if isinstance(value, dict) else value
        for key, value in model.__dict__.items()
    }
    for name, child in model._modules.items():
        if child is not None:
            twin._modules[name] = _recast_tree(child, source, to, twins)
    return twin


def fuse(model: nn.Module) -> nn.Module:
    """`model` with every `reference.ELF` in it replaced by `ELF`. Parameters and buffers are
    shared, not copied; `model` itself is left as it is.

    Raises:
        ValueError: `model` holds no `reference.ELF`, or it or a module around it is compiled or has
            a `forward` of its own. Fuse before torch.compile.
    """
    return _recast(model, reference.ELF, ELF)


def unfuse(model: nn.Module) -> nn.Module:
    """The reverse of `fuse`: every `ELF` becomes a `reference.ELF`."""
    return _recast(model, ELF, reference.ELF)
