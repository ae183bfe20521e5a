"""`Monitor`: watches unlabelled traffic for drift from a policy's calibration data.

Shapes: E exits; a batch of n samples.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import checks
from .artefact import Policy
from .drift import compare

__all__ = ["Monitor"]

_BLOCKS = 10  # of a window, which moves by a block at a time
_LARGEST = 2**53  # the last integer that float64 sums count exactly


class Monitor:
    """Compares the traffic of a network with the calibration data of its policy, without labels.

    It keeps sums over a window of the newest samples, in ten blocks: its memory is constant, and
    the window moves on when a block is full. On a GPU the sums stay there until they are asked for.
    Calls from several threads are safe if these use one CUDA stream; otherwise give every thread a
    monitor and merge them.

    Args:
        policy: the one that the network uses (`ELF.apply_policy`).
        window: samples, at least 100.
        samples_per_false_alarm: traffic like the calibration data raises at most one alarm in so
            many samples on average, if its samples are independent. See docs/drift.md.

    Raises:
        TypeError, ValueError: naming the argument.

    Examples:
        >>> monitor = Monitor(model.policy)
        >>> monitor.update(model(images))
        >>> if monitor.alarm:
        ...     print(monitor.alarm)
    """

    def __init__(
        self,
        policy: Policy,
        *,
        window: int = 2000,
        samples_per_false_alarm: int = 100_000_000,
    ) -> None:
        if not isinstance(policy, Policy):
            raise TypeError(f"policy: expected a Policy, got {checks.describe(policy)}")
        if policy.measured.samples < 1:
            raise ValueError("policy: expected one measured on at least one sample, got none")
        checks.integer("window", window, 100, _LARGEST)
        checks.integer("samples_per_false_alarm", samples_per_false_alarm, window, _LARGEST)
        self._policy = policy
        self._window = window
        self._block = math.ceil(window / _BLOCKS)
        #: The window moves, and an alarm may begin, once in so many samples.
        self._samples_per_move = self._block
        self._samples_per_false_alarm = samples_per_false_alarm
        self._lock = threading.Lock()
        #: [4, E + 1] sums of a block: see `_sums`.
        self._closed: deque[Tensor] = deque(maxlen=_BLOCKS)
        self._open: Tensor | None = None
        self._in_open = 0
        self._seen = 0

    def update(self, output: Any = None, *, exit_index: Any = None, confidence: Any = None) -> None:
        """Adds the samples of a batch.

        Args:
            output: an `ELFOutput`; or, instead of it, both of the following, as tensors, arrays or
                lists.
            exit_index: [n] integers in [0, E).
            confidence: [n], the statistic of the policy's criterion at the exit taken.

        Raises:
            TypeError, ValueError: naming the argument; nothing is added. On a GPU the values of
                exit_index are looked at when the numbers are asked for.
        """
        if (output is None) == (exit_index is None and confidence is None):
            raise TypeError(
                "output: expected either an ELFOutput or exit_index and confidence, got "
                f"{'neither' if output is None else 'both'}"
            )
        if output is not None:
            exit_index = getattr(output, "exit_index", None)
            confidence = getattr(output, "confidence", None)
            if exit_index is None or confidence is None:
                raise TypeError(f"output: expected an ELFOutput, got {checks.describe(output)}")
        e, s = _checked(exit_index, confidence, self._policy.exits)
        sums = _sums(e, s, self._policy.exits)
        with self._lock:
            self._open = sums if self._open is None else self._open.to(sums.device) + sums
            self._in_open += len(e)
            self._seen += len(e)
            if self._in_open >= self._block:
                self._closed.append(self._open)
                self._open, self._in_open = None, 0

    def report(self) -> dict[str, Any]:
        """The window beside the calibration data, as a dict that JSON can hold.

        - seen: samples since the start. window, samples: the window's size, and how many samples of
          its full blocks the following numbers are about. Before the first block is full there are
          none, and the dict ends here but for alarm.
        - exits: by exit, the share of the samples that took it and their mean statistic, and both
          in calibration.
        - psi, psi_limit: the population stability index of the shares, and its alarm limit.
        - statistic, calibration_statistic, statistic_limit: the mean over all samples. An alarm
          means less sure than the limit; None: the criterion has no bounds.
        - estimated_accuracy: value, low and high (95%); calibration_accuracy: the measured one.
        - not_finite: samples whose statistic is NaN or infinite.
        - alarm: the reason in words, or None. None until the window is full.

        Raises:
            ValueError: a GPU counted values of exit_index outside [0, E).
        """
        with self._lock:
            blocks, seen = list(self._closed), self._seen
        found: dict[str, Any] = {"seen": seen, "window": self._window}
        if not blocks:
            return {**found, "samples": 0, "alarm": None}
        sums = torch.stack([block.cpu() for block in blocks]).sum(0).numpy()
        if sums[0, -1]:
            raise ValueError(
                f"exit_index: expected values in [0, {self._policy.exits}), got others for "
                f"{int(sums[0, -1])} samples of the window"
            )
        alpha = self._samples_per_move / self._samples_per_false_alarm
        full = len(blocks) == _BLOCKS
        return found | compare(self._policy, sums[:, :-1], alpha, full=full)

    @property
    def alarm(self) -> str | None:
        """Why the traffic of the window differs from calibration, in words; None if it does not."""
        return self.report()["alarm"]

    def metrics(self) -> dict[str, float]:
        """The numbers of `report` by names as Prometheus writes them, such as
        `elf_fast_drift_exit_share{exit="1"}`; one line `name value` each is its text format."""
        found = self.report()
        made = {"samples": found["samples"], "alarm": float(found["alarm"] is not None)}
        for name in ("psi", "psi_limit", "statistic", "statistic_limit", "not_finite"):
            made[name] = found.get(name)
        made["estimated_accuracy"] = found.get("estimated_accuracy", {}).get("value")
        for e, at in enumerate(found.get("exits", ())):
            made[f'exit_share{{exit="{e + 1}"}}'] = at["share"]
        return {f"elf_fast_drift_{name}": float(v) for name, v in made.items() if v is not None}

    def state(self) -> dict[str, Any]:
        """What `merged` needs, as a dict that JSON can hold. The block that is not full is left
        out."""
        with self._lock:
            blocks, seen = list(self._closed), self._seen
        return {
            "policy": _digest(self._policy),
            "window": self._window,
            "seen": seen,
            "blocks": [block.tolist() for block in blocks],
        }

    @classmethod
    def merged(
        cls,
        policy: Policy,
        states: Iterable[Mapping[str, Any]],
        *,
        samples_per_false_alarm: int = 100_000_000,
    ) -> Monitor:
        """One monitor of the traffic of several workers, from their `state`. Its window is as large
        as theirs together, and is full when theirs are.

        Raises:
            TypeError, ValueError: no states, or one that is damaged or of another policy.
        """
        checked = [_checked_state(i, state, policy) for i, state in enumerate(states)]
        if not checked:
            raise ValueError("states: expected at least one, got none")
        windows = [window for window, _, _ in checked]
        made = cls(policy, window=sum(windows), samples_per_false_alarm=samples_per_false_alarm)
        made._samples_per_move = math.ceil(min(windows) / _BLOCKS)
        made._seen = sum(seen for _, seen, _ in checked)
        for age in range(max(len(blocks) for _, _, blocks in checked), 0, -1):
            same = [blocks[-age] for _, _, blocks in checked if len(blocks) >= age]
            # A window is full only if those of all workers are.
            if len(same) == len(checked) or age < _BLOCKS:
                made._closed.append(torch.stack(same).sum(0))
        return made


def _checked(exit_index: Any, confidence: Any, exits: int) -> tuple[Tensor, Tensor]:
    """(exit_index [n], confidence [n]) as tensors on one device."""
    e, s = _vector("exit_index", exit_index), _vector("confidence", confidence)
    if len(e) and (e.is_floating_point() or e.is_complex() or e.dtype == torch.bool):
        raise TypeError(f"exit_index: expected integers, got {checks.describe(e)}")
    if len(s) and not s.is_floating_point():
        raise TypeError(f"confidence: expected floating numbers, got {checks.describe(s)}")
    if len(e) != len(s):
        raise ValueError(f"confidence: expected {len(e)} values, one per exit_index, got {len(s)}")
    device = e.device if e.device.type == "cuda" else torch.device("cpu")
    e, s = e.to(device).long(), s.to(device)
    if device.type == "cpu" and len(e) and not 0 <= int(e.min()) <= int(e.max()) < exits:
        wrong = e[(e < 0) | (e >= exits)]
        raise ValueError(f"exit_index: expected values in [0, {exits}), got {int(wrong[0])}")
    return e, s


def _vector(name: str, value: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(value, device=checks.device_for(value)).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name}: expected a tensor, an array or a list, got {type(value).__name__}"
        ) from error
    if tensor.dim() != 1:
        raise ValueError(f"{name}: expected shape [n], got {checks.describe(tensor)}")
    return tensor


def _sums(exit_index: Tensor, confidence: Tensor, exits: int) -> Tensor:
    """[4, E + 1] float64, by exit: samples, samples with a finite statistic, the sum of their
    statistics and the sum of the squares. The last column counts what is no exit, so that nothing
    has to wait for the device."""
    is_exit = (exit_index >= 0) & (exit_index < exits)
    finite = confidence.isfinite()
    s = torch.where(finite, confidence, 0).double()
    rows = torch.stack([torch.ones_like(s), finite.double(), s, s * s])
    sums = torch.zeros(4, exits + 1, dtype=torch.float64, device=s.device)
    return sums.index_add_(1, torch.where(is_exit, exit_index, exits), rows)


def _digest(policy: Policy) -> str:
    """Tells the policies of several workers apart."""
    held = (policy.thresholds, policy.temperatures, policy.data_digest, policy.weights_digest)
    return hashlib.sha256(repr(held).encode()).hexdigest()


def _checked_state(i: int, state: Any, policy: Policy) -> tuple[int, int, list[Tensor]]:
    """(window, samples seen, blocks [4, E + 1]) of a state."""
    try:
        digest, window, seen = state["policy"], state["window"], state["seen"]
        blocks = [torch.from_numpy(np.array(b, dtype=np.float64)) for b in state["blocks"]]
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise TypeError(
            f"states[{i}]: expected what Monitor.state returns, got {checks.describe(state)}"
        ) from error
    if digest != _digest(policy):
        raise ValueError(f"states[{i}]: expected one of this policy, got one of another")
    checks.integer(f"states[{i}].window", window, 100, _LARGEST)
    checks.integer(f"states[{i}].seen", seen, 0, _LARGEST)
    shape = (4, policy.exits + 1)
    wrong = [b for b in blocks if b.shape != shape or not bool(b.isfinite().all())]
    if wrong or len(blocks) > _BLOCKS:
        raise ValueError(
            f"states[{i}].blocks: expected at most {_BLOCKS} of shape {list(shape)} with finite "
            f"numbers, got {len(blocks)} with {[list(b.shape) for b in blocks[:3]]}"
        )
    return window, seen, blocks
