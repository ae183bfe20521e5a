"""`ELF`, the drop-in for `reference.ELF` that runs on the fused operators."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checks, functional, ops, ranks, reference
from .reference import ELFOutput, ExitHead

__all__ = ["ELF", "ELFOutput", "ExitHead", "fuse", "unfuse"]


class _Exit(NamedTuple):
    """One exit's results for the n samples that reach it."""

    logits: Tensor  # [n, C]
    confidence: Tensor  # [n]
    prediction: Tensor  # [n]
    survivors: Tensor  # [n] of which the first `survivor_count` are meant
    survivor_count: Tensor  # []
    losses: Tensor | None = None  # [n] or None without a target
    may_be_held: bool = True  # the logits, by a head of the user's


class ELF(reference.ELF):
    """A network with early exits, on fused kernels: same arguments, `state_dict` and results as
    `reference.ELF` (see there), faster.

    At every exit one kernel does softmax, test and survivor indices (with `ExitHead`, pool and
    classifier as well; in training, the loss of the long-tail family). Where samples are dropped,
    survivors move into a dense batch, so that the later stages compute on them alone.

    Example:
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
        thresholds = self._active_thresholds().unbind(0)
        temperatures = self.temperatures.unbind(0)
        last = len(self.stages) - 1
        alive: Tensor | None = None  # [n] samples that reach the current stage; None: all
        present: Tensor | None = None  # [n] their rows in x, where x holds others, too
        y = None if target is None else target.contiguous()  # as the operators take it
        out: ELFOutput | None = None
        loss: Tensor | None = None
        for e, (stage, head) in enumerate(zip(self.stages, self.heads, strict=True)):
            x = stage(x)
            rows = N if alive is None else alive.shape[0]
            result = self._exit(
                e,
                x,
                head,
                y,
                present,
                rows,
                thresholds[e] if e < last else torch.scalar_tensor(self._never),
                temperatures[e] if e < last else torch.scalar_tensor(1.0),
                is_last=e == last,
            )
            if e == 0:
                dtype = result.logits.dtype
            n = 0 if e == last else int(result.survivor_count)
            if n < 0:
                checks.target_range(y, result.logits.shape[1])
            # Where nobody leaves a later exit overwrites every row, but backward passes this one.
            if n < rows or torch.is_grad_enabled():
                out = self._record(out, alive, result, e, dtype)
            if result.losses is not None:
                loss = reference._add(loss, self.exit_weights[e] * result.losses.sum())
            if e == last:
                break
            observed = batch.observed(n)
            if n == 0:
                if batch.shared:
                    assert out is not None
                    _, zero = self._without_survivors(x, batch, e + 1, observed)
                    out, loss = reference._add_zero(out, loss, zero)
                break
            if n < rows:
                survivors = result.survivors[:n]
                alive = survivors if alive is None else alive.index_select(0, survivors)
                y = None if y is None else y.index_select(0, survivors)
                if drop:
                    keep = survivors if present is None else present.index_select(0, survivors)
                    keep, present = self._rows_to_keep(keep, x.shape[0], observed)
                    x = functional._call(ops.compact, (x,), (x, keep))
                else:
                    present = alive
        assert out is not None
        return out._replace(loss=None if loss is None else batch.mean(loss))

    def _exit(
        self,
        e: int,
        x: Tensor,
        head: nn.Module,
        y: Tensor | None,
        present: Tensor | None,
        rows: int,
        threshold: Tensor,
        temperature: Tensor,
        *,
        is_last: bool,
    ) -> _Exit:
        """Logits, gate and losses at exit e of the n = `rows` samples that reach it."""
        code = checks.CRITERIA.index(self.criterion)
        # Nobody reads the confidence of a sample that goes on: a later exit overwrites it.
        early_stop = not is_last
        gate_target = y if self.training else None
        if y is None and present is None and _is_fusable(head):
            assert isinstance(head, ExitHead)
            features = head.stem(x)
            checks.poolable(features)
            weight, bias = head.classifier.weight, head.classifier.bias
            checks.classifier(weight, bias, features.shape[2 if features.dim() == 3 else 1])
            self._check_classes(weight.shape[0], e)
            t, T = _in_arithmetic_of(weight, threshold, temperature)
            z, _, *gate = functional._call(
                ops.exit_head,
                (features, weight, bias),
                (features, weight, bias, t, T, code, None, early_stop, True),
            )
            self._check_logits(z, e, rows)
            return _Exit(z, *gate)._replace(may_be_held=False)
        z = head(x)
        if present is not None:
            z = z[present]
        self._check_logits(z, e, rows)
        checks.logits(z)
        t, T = _in_arithmetic_of(z, threshold, temperature)
        family = self._family()
        if y is not None and self.training and family is not None:
            losses, _, *gate = _family_loss(z, y, family, t, T, code)
            return _Exit(z, *gate)._replace(losses=losses)
        gate = functional._call(
            ops.exit_gate,
            (),
            (z, t, T, code, gate_target, early_stop),
            lambda: checks.target_range(gate_target, z.shape[1]),
        )
        return _Exit(z, *gate)._replace(losses=None if y is None else self._losses(z, y))

    def _losses(self, z: Tensor, y: Tensor) -> Tensor:
        family = self._family()
        if family is None:
            return super()._losses(z, y)
        return functional.exit_loss(z, y, **family).loss

    def _record(
        self, out: ELFOutput | None, alive: Tensor | None, r: _Exit, e: int, dtype: torch.dtype
    ) -> ELFOutput:
        """As reference._write, but in place where no gradient forbids it."""
        confidence = r.confidence
        if torch.is_grad_enabled():
            confidence = confidence.detach()
        if confidence.dtype != torch.float32:
            confidence = confidence.float()
        if out is None or alive is None:
            # Later exits write into the logits.
            copy = r.may_be_held and not torch.is_grad_enabled()
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


def _is_fusable(head: nn.Module) -> bool:
    """An ExitHead as it was made: no hooks to run, no classifier put in place of the linear one."""
    return (
        type(head) is ExitHead
        and type(head.classifier) is nn.Linear
        and not _has_hooks(head)
        and not _has_hooks(head.classifier)
    )


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _in_arithmetic_of(x: Tensor, *settings: Tensor) -> tuple[Tensor, ...]:
    """Settings as the kernels take them; who assigns to a buffer of ELF may choose any dtype."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    return tuple(s if s.dtype == acc else s.to(acc) for s in settings)


def _family_loss(z: Tensor, y: Tensor, family: dict[str, Any], t: Tensor, T: Tensor, code: int):
    names = ("weight", "margins", "bias")
    vectors = functional._class_vectors(z, **{name: family.get(name) for name in names})
    return functional._call(
        ops.exit_loss,
        (z,),
        (z, y, *vectors, family.get("gamma", 0.0), family.get("scale", 1.0),
         family.get("label_smoothing", 0.0), t, T, code),
        lambda: checks.target_range(y, z.shape[1]),
    )  # fmt: skip


def _recast(model: nn.Module, source: type[nn.Module], to: type[nn.Module]) -> nn.Module:
    """A model that shares every submodule, parameter and buffer with `model`, with `source`
    modules, at any depth, turned into `to`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {checks.describe(model)}")
    if not any(type(module) is source for module in model.modules()):
        raise ValueError(
            f"model: expected an {source.__module__}.{source.__qualname__} in it, "
            f"got {type(model).__module__}.{type(model).__qualname__} without one"
        )
    return _recast_tree(model, source, to)


def _recast_tree(model: nn.Module, source: type[nn.Module], to: type[nn.Module]) -> nn.Module:
    if not any(type(module) is source for module in model.modules()):
        return model
    twin = model.__new__(to if type(model) is source else type(model))
    twin.__dict__ = {
        key: value.copy() if isinstance(value, dict) else value
        for key, value in model.__dict__.items()
    }
    for name, child in model._modules.items():
        if child is not None:
            twin._modules[name] = _recast_tree(child, source, to)
    return twin


def fuse(model: nn.Module) -> nn.Module:
    """`model` with every `reference.ELF` in it replaced by `ELF`. Parameters and buffers are
    shared, not copied; `model` itself is left as it is.

    Raises:
        ValueError: `model` holds no `reference.ELF`.
    """
    return _recast(model, reference.ELF, ELF)


def unfuse(model: nn.Module) -> nn.Module:
    """The way back from `fuse`."""
    return _recast(model, ELF, reference.ELF)
