"""What `reference.ELF` and `elf_fast.ELF` share: arguments, buffers, checks, empty batches.

The two classes differ only in `forward` and in how they compute a loss. The specification is in
`reference.py`, the fast operators are called in `modules.py`.

Shapes: N samples, C classes, E exits (exit E is the network's own classifier).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import checks, criteria, digests, exit_settings, ranks
from .criteria import Criterion, Score
from .weight_decay import undecayed

__all__ = ["ELFBase", "ELFOutput", "accumulated", "apart_from", "writable"]

_Model = TypeVar("_Model", bound="ELFBase")

#: Buffers that hold settings. They are float32 whatever the network's dtype is.
_SETTINGS = ("thresholds", "train_thresholds", "temperatures")


class ELFOutput(NamedTuple):
    """What `ELF` returns, in input order: each sample's values at the exit it took."""

    logits: Tensor  # [N, C]
    prediction: Tensor  # [N] int64
    confidence: Tensor  # [N] float32
    exit_index: Tensor  # [N] int64, 0-based
    loss: Tensor | None  # [] or None without a target


def accumulated(x: Tensor) -> Tensor:
    """x in the dtype of the arithmetic: float32, or float64 for float64 x."""
    return x if x.dtype == torch.float64 else x.float()


def apart_from(given: Tensor, x: Tensor) -> Tensor:
    """x, or a copy if it is a view of the caller's batch `given`: what comes next may write into x,
    and must not change the batch. torch.func and torch's compiler hide which tensors are views, so
    there it is always a copy.
    """
    hidden = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    is_view = hidden or torch._C._is_alias_of(x, given)  # type: ignore[attr-defined]
    return x.clone() if is_view else x


def writable(x: Tensor) -> Tensor:
    """x [n, ...] for the next stage, which may begin with an operation in place. What it writes
    must not reach the tensors that this exit saved for backward, nor logits that are a view of x.

    A lazy clone copies only if somebody writes. Without gradients nothing is saved, and
    `modules.ELF` copies the logits that it keeps. Rows that share memory, as `expand` makes them,
    cannot be written apart, so they are always copied, except in torch's compiler.
    """
    if torch.compiler.is_compiling():
        return x.clone() if torch.is_grad_enabled() else x
    if _shares_memory(x):
        return x.clone()
    if not torch.is_grad_enabled():
        return x
    hidden = type(x) is not Tensor or torch._C._are_functorch_transforms_active()
    if hidden or not _can_clone_lazily(x.device):
        return x.clone()
    try:
        return torch._lazy_clone(x)
    except RuntimeError:  # the memory is not torch's own but, for example, NumPy's
        return x.clone()


def _shares_memory(x: Tensor) -> bool:
    """Whether elements of x may lie in one place: they do not if every stride leads past all that
    the smaller strides reach."""
    if x.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _can_clone_lazily(device: torch.device) -> bool:
    """On a GPU torch makes the copy on the default stream, whichever stream writes."""
    if device.type == "cpu":
        return True
    if device.type != "cuda":
        return False
    return torch.cuda.current_stream(device) == torch.cuda.default_stream(device)


class ELFBase(nn.Module):
    """A network with early exits. `reference.ELF` documents the arguments and what they mean."""

    temperatures: Tensor
    _evaluates_by_batch = False  # for models pickled without it
    #: Names of parameters that a network cut by `models.from_backbone` excludes from weight decay.
    undecayed: frozenset[str] = frozenset()
    #: What `elf_fast.load` sets: the names [C] and training images [C] of the classes, the
    #: `data.Preprocessing` of images, and the `policy.Policy` that was applied last.
    class_names: tuple[str, ...] = ()
    class_counts: tuple[int, ...] = ()
    transform: Any = None
    policy: Any = None
    #: How the network was built, in plain values. `from_backbone` and `elf_fast.load` note it for
    #: `elf_fast.save`. None: by other code.
    origin: dict[str, Any] | None = None

    def __init__(
        self,
        stages: Sequence[nn.Module],
        heads: Sequence[nn.Module],
        *,
        thresholds: float | Sequence[float] | Tensor = 0.9,
        train_thresholds: float | Sequence[float] | Tensor | None = None,
        temperatures: float | Sequence[float] | Tensor = 1.0,
        criterion: str | Score = "confidence",
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
        criteria.find(criterion)
        self.stages = nn.ModuleList(stages)
        self.heads = nn.ModuleList(heads)
        self.criterion = criterion
        self.exit_loss = exit_loss
        self.drop_exited = drop_exited
        self.exit_weights = exit_settings.exit_weights(exit_weights, len(stages))
        self._note_batch_statistics()
        given = (thresholds, train_thresholds, temperatures)
        for name, value in zip(_SETTINGS, given, strict=True):
            self.register_buffer(name, self._checked(name, value))

    @abstractmethod
    def forward(self, x: Tensor, target: Tensor | None = None) -> ELFOutput: ...

    # Settings

    @property
    def thresholds(self) -> Tensor:
        """[E-1] or [E-1, C] float32, the buffer itself: `model.thresholds[0] = 0.8` works, too."""
        held = self._without_nan("thresholds")
        assert held is not None
        return held

    @thresholds.setter
    def thresholds(self, value: float | Sequence[float] | Tensor) -> None:
        self._set_buffer("thresholds", value)

    @property
    def train_thresholds(self) -> Tensor | None:
        """As `thresholds`, or None."""
        return self._without_nan("train_thresholds")

    @train_thresholds.setter
    def train_thresholds(self, value: float | Sequence[float] | Tensor | None) -> None:
        self._set_buffer("train_thresholds", value)

    def _set_buffer(self, name: str, value: Any) -> None:
        if name not in self.__dict__.get("_buffers", ()):
            raise AttributeError(f"{name}: expected a model whose constructor has run")
        setattr(self, name, value)  # `__setattr__` checks and converts it

    def _without_nan(self, name: str) -> Tensor | None:
        """A buffer of thresholds, after NaN in it is replaced by "off".

        Tools that average models (torch's AveragedModel, timm's ModelEmaV3) average float buffers,
        too, and inf - inf is NaN. NaN passes no test, so the exit is off for `forward` either way.
        """
        if name not in self._buffers:  # the constructor has not come to it
            raise AttributeError(name)
        held = self._buffers[name]
        traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
        if held is None or held.is_meta or traced:
            return held
        nan = held.detach().isnan()
        if held.device.type != "cpu" or bool(nan.any()):  # another device would have to be read
            with torch.inference_mode(held.is_inference()), torch.no_grad():
                # Through `data`, because autograd may have saved the buffer.
                held.data.masked_fill_(nan, self._active_criterion().off)
        return held

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name in ("thresholds", "train_thresholds"):
            self._without_nan(name)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _checked(self, name: str, value: Any) -> Tensor | None:
        """A setting, checked and converted to the tensor that its buffer holds."""
        exits = len(self.stages) - 1
        if name == "temperatures":
            return exit_settings.temperatures(value, exits)
        if name == "train_thresholds" and value is None:
            return None
        classes = exit_settings.classes_of(self.heads)
        return exit_settings.thresholds(name, value, exits, criteria.find(self.criterion), classes)

    def __setattr__(self, name: str, value: Any) -> None:
        """What is assigned to a setting is checked and converted as in the constructor."""
        if name in _SETTINGS and name in self.__dict__.get("_buffers", ()):
            if self.__dict__.get("_is_replica"):  # nn.DataParallel's: on its own device already
                self._buffers[name] = value
                return
            value = self._checked(name, value)
            if value is not None:
                # A model that waits on the meta device takes values where they are.
                held = self.thresholds
                if value.is_meta and not held.is_meta:
                    raise ValueError(f"{name}: expected values, got a tensor on the meta device")
                value = value if held.is_meta else value.to(held.device)
        elif name == "criterion" and "thresholds" in self.__dict__.get("_buffers", ()):
            self._change_criterion(value)
            return
        elif name == "exit_weights":
            value = exit_settings.exit_weights(value, len(self.stages))
        elif name == "drop_exited" and value not in (None, True, False):
            raise TypeError(f"drop_exited: expected True, False or None, got {value!r}")
        elif name == "exit_loss":
            if value is not None and not callable(value):
                raise TypeError(
                    "exit_loss: expected a callable (logits, target) -> losses [n], "
                    f"got {checks.describe(value)}"
                )
            self.__dict__.get("_modules", {}).pop(name, None)  # one that was a module
        super().__setattr__(name, value)

    def _change_criterion(self, value: str | Score) -> None:
        """Exits that are off stay off. Other thresholds must lie in the new criterion's range."""
        before, after = self._active_criterion(), criteria.find(value)
        changed = {}
        for name in ("thresholds", "train_thresholds"):
            t = getattr(self, name)
            if t is not None and not t.is_meta:
                changed[name] = t.masked_fill(t == before.off, after.off)
                checks.threshold_values(name, changed[name], after)
        self._modules.pop("criterion", None)  # one that was a module
        super().__setattr__("criterion", value)  # type: ignore[arg-type]
        self._buffers.update(changed)

    def apply_policy(self, policy: Any) -> None:
        """Sets criterion, thresholds and temperatures to those of a `policy.Policy`. The weights
        stay, and so do `train_thresholds`, which the new criterion then reads.

        Raises:
            TypeError: it is no policy.
            ValueError: it was made for other weights, or for another number of exits or classes;
                the model is left as it was.
        """
        wanted = ("criterion", "thresholds", "temperatures", "weights_digest")
        if not all(hasattr(policy, name) for name in wanted):
            raise TypeError(f"policy: expected a Policy, got {checks.describe(policy)}")
        criterion, exits = criteria.find(policy.criterion), len(self.stages) - 1
        classes = exit_settings.classes_of(self.heads)
        thresholds = exit_settings.thresholds(
            "policy.thresholds", policy.thresholds, exits, criterion, classes
        )
        temperatures = exit_settings.temperatures(policy.temperatures, exits)
        own = digests.of_weights(self.state_dict())
        if policy.weights_digest not in (None, own):
            raise ValueError(
                f"policy: expected one for these weights ({own[:12]}), got one for others "
                f"({policy.weights_digest[:12]}): calibrate again"
            )
        before = self.thresholds.clone()
        self.thresholds = torch.full_like(before, self._active_criterion().off)
        try:
            self.criterion = policy.criterion
        except ValueError:  # train_thresholds do not fit the criterion
            self.thresholds = before
            raise
        self.thresholds, self.temperatures = thresholds, temperatures
        self.policy = policy

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Loads thresholds [E-1] into a buffer [E-1, C] and vice versa. All are checked first."""
        state_dict = dict(state_dict)
        for name in _SETTINGS:
            key, held = prefix + name, getattr(self, name)
            if held is None or not isinstance(state_dict.get(key), Tensor):
                continue
            try:
                found = self._checked(name, state_dict[key])
            except (TypeError, ValueError) as error:
                error_msgs.append(f"{prefix}{error}")
                state_dict[key] = held
                continue
            assert found is not None
            state_dict[key] = found
            if found.shape != held.shape:
                self._buffers[name] = held.new_empty(found.shape)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ELFBase:
        """Moves the settings with the network, but keeps their dtype and values: `to_empty` would
        lose them. A buffer that several stages read stays one tensor."""
        exact = {name: self._buffers[name] for name in _SETTINGS}
        held = [
            (module._buffers, name, buffer)
            for module in self.modules()
            for name, buffer in module._buffers.items()
        ]
        super()._apply(fn, recurse)
        moved: dict[int, Tensor | None] = {}
        for buffers, name, before in held:
            buffers[name] = moved.setdefault(id(before), buffers[name])
        for name, before in exact.items():
            after = self._buffers[name]
            if before is not None and after is not None and not before.is_meta:
                self._buffers[name] = before.to(after.device)
        return self

    @property
    def drops_exited(self) -> bool:
        """Whether exited samples are dropped from the later stages in the network's current mode.
        In training: as `drop_exited` says. In evaluation: always, unless a later stage or head has
        a BatchNorm without running statistics, whose results would depend on who has left."""
        if not self.training:
            return not self._evaluates_by_batch
        if self.drop_exited is not None:
            return self.drop_exited
        return not any(
            norm.training or norm.running_mean is None for norm in self._norms_after_first_exit()
        )

    def _norms_after_first_exit(self) -> Iterator[_BatchNorm]:
        for part in chain(self.stages[1:], self.heads[1:]):
            for module in part.modules():
                if isinstance(module, _BatchNorm):
                    yield module

    def _note_batch_statistics(self) -> None:
        """Looks through the modules now, because evaluation has no time for it."""
        self._evaluates_by_batch = any(
            norm.running_mean is None for norm in self._norms_after_first_exit()
        )

    def train(self: _Model, mode: bool = True) -> _Model:
        super().train(mode)
        self._note_batch_statistics()
        return self

    def _active_thresholds(self) -> Tensor:
        buffers = self._buffers
        active = buffers["train_thresholds"] if self.training else None
        if active is None:
            active = buffers["thresholds"]
        assert active is not None
        return active

    def _active_criterion(self) -> Criterion:
        return criteria.find(self.criterion)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay must leave out, because a module of the network
        or the network that `models.from_backbone` cut says so. timm's optimisers ask for them."""
        found = {
            f"{part}.{name}"
            for part in ("stages", "heads")
            for name in undecayed(self.get_submodule(part))
        }
        names = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        return found | (self.undecayed & names)

    # Losses

    def _family(self) -> dict[str, Any] | None:
        """The arguments of `functional.exit_loss` that compute the loss. None if `exit_loss` is the
        user's own callable, which `_called_loss` calls."""
        if self.exit_loss is None:
            return {}
        as_family = getattr(self.exit_loss, "as_family", None)  # of elf_fast.losses
        return None if as_family is None else as_family()

    @abstractmethod
    def _losses(self, z: Tensor, y: Tensor) -> Tensor:
        """Per-sample losses [n], float32 at least, of logits [n, C] and targets [n]."""

    def _called_loss(self, z: Tensor, y: Tensor) -> Tensor:
        """`_losses` by calling `exit_loss`."""
        assert self.exit_loss is not None
        losses = self.exit_loss(z, y)
        if not isinstance(losses, Tensor) or losses.shape != y.shape:
            raise ValueError(
                f"exit_loss: expected losses of shape [{len(y)}], one per sample "
                f'(reduction="none"), got {checks.describe(losses)}'
            )
        return accumulated(losses)

    # Checks

    def _check_input(self, x: Tensor, target: Tensor | None) -> int:
        """Checks the arguments of `forward` and returns N."""
        checks.tensor("x", x)
        if x.dim() < 1:
            raise ValueError(f"x: expected a batch [N, ...], got {checks.describe(x)}")
        if target is not None:
            checks.target_shape(target, x.shape[0], x.device)
        return x.shape[0]

    def _check_features(self, x: Any, e: int) -> None:
        """What stage e returned. The last of several may return whatever its head takes."""
        is_last_of_several = e > 0 and e == len(self.stages) - 1
        if not isinstance(x, Tensor) and not is_last_of_several:
            raise TypeError(f"stages[{e}]: expected to return a tensor, got {checks.describe(x)}")

    def _check_logits(self, z: Any, e: int, rows: int) -> None:
        if not isinstance(z, Tensor) or z.dim() != 2 or z.shape[0] != rows:
            raise ValueError(
                f"heads[{e}]: expected logits of shape [{rows}, C], got {checks.describe(z)}"
            )

    def _check_classes(self, found: int, e: int, before: int | None) -> None:
        """Checks that head e gives as many classes as the heads before (None: there are none), and
        C of per-class thresholds where `exit_settings.classes_of` could not tell it."""
        if before is not None and found != before:
            raise ValueError(
                f"heads[{e}]: expected logits of {before} classes, as the heads before it give, "
                f"got {found}"
            )
        for name in ("thresholds", "train_thresholds"):
            t = self._buffers[name]
            if t is not None and t.dim() == 2 and t.shape[1] != found:
                raise ValueError(
                    f"{name}: expected [E-1, C] with C = {found} (the classes of heads[{e}]), "
                    f"got {list(t.shape)}"
                )

    # Rows

    def _rows_to_keep(
        self, survivors: Tensor, rows: int, reaching: int
    ) -> tuple[Tensor, Tensor | None]:
        """The rows [m] of the features to keep, and the positions [n] of the survivors among them
        (None: the rows are exactly the survivors).

        In training, batch statistics need two values per channel. If reaching = 1, only one sample
        survives (on all ranks, under SyncBatchNorm), and one exited sample is kept with weight 0.
        """
        if self.training and reaching == 1 < rows:
            first = torch.zeros_like(survivors)
            return torch.cat([first, survivors.clamp_min(1)]), survivors.clamp_max(1)
        return survivors, None

    def _forward_empty(self, x: Tensor, target: Tensor | None, batch: ranks.Batch) -> ELFOutput:
        """N = 0: empty outputs and a zero loss that still backpropagates into every parameter."""
        z, zero = self._run_without_samples(x, batch, 0, batch.entering())
        if target is not None:
            zero = zero + self._losses(z, target).sum()  # because the loss may have parameters, too
        indices = x.new_zeros(0, dtype=torch.int64)
        loss = None if target is None else batch.mean(zero)
        confidence = z.new_zeros(0, dtype=torch.float32)
        return ELFOutput(z, indices, confidence, indices.clone(), loss)

    def _join_other_ranks(
        self,
        out: ELFOutput,
        loss: Tensor | None,
        x: Tensor,
        batch: ranks.Batch,
        first: int,
        reaching: int,
    ) -> tuple[ELFOutput, Tensor | None]:
        """Runs the stages from `first` on without samples, because other ranks may have survivors
        there. Adds a zero to logits and loss that backpropagates into those stages."""
        if not batch.shared:
            return out, loss
        _, zero = self._run_without_samples(x, batch, first, reaching, out.logits.shape[1])
        return out._replace(logits=out.logits + zero), None if loss is None else loss + zero

    def _run_without_samples(
        self,
        x: Tensor,
        batch: ranks.Batch,
        first: int,
        reaching: int,
        classes: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Runs the stages from `first` on, which no sample of this process reaches.

        Returns the last exit's logits [0, C], and a zero [] that backpropagates into every
        parameter on the way.

        x is empty, unless exited samples are kept in the batch and `reaching` > 0 samples of other
        ranks are to be normalised together with those here.
        """
        drop = self.drops_exited
        zero = x.new_zeros((), dtype=torch.float32)
        for e in range(first, len(self.stages)):
            if drop or not reaching:
                x = x[:0]
            x = writable(x)
            with ranks.batch_norm_without_samples(self, x, reaching=reaching) as x:
                rows = len(x)
                x = self.stages[e](x)
                self._check_features(x, e)
                z = self.heads[e](x)
            self._check_logits(z, e, rows)
            self._check_classes(z.shape[1], e, classes)
            classes = z.shape[1]
            z = z[:0]
            zero = zero + z.sum()
            if reaching and e < len(self.stages) - 1:
                reaching = batch.reaching(0)
        return z, zero

    def extra_repr(self) -> str:
        t = self.thresholds
        shown = f"{list(t.shape)} on the meta device" if t.is_meta else t.tolist()
        return (
            f"criterion={self.criterion!r}, thresholds={shown}, "
            f"exit_weights={list(self.exit_weights)}, drop_exited={self.drop_exited}"
        )
