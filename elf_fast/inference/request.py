"""`Request`: samples that one caller wants classified, and what became of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import checks
from ..base import ELFOutput

__all__ = ["OUTCOMES", "DeadlineExceeded", "OnExit", "QueueFull", "Request", "SchedulerClosed"]

#: How a request can end.
OUTCOMES = ("answered", "failed", "expired", "cancelled", "closed")

#: Called with the indices of samples of a request that left, and with their values [m, ...].
OnExit = Callable[[list[int], ELFOutput], None]


class DeadlineExceeded(TimeoutError):
    """The deadline of a request passed before all of its samples had left."""


class QueueFull(RuntimeError):
    """A scheduler holds as many samples as it may."""


class SchedulerClosed(RuntimeError):
    """A scheduler was shut down before it answered, or takes no more requests."""


class Request:
    """k samples in a scheduler.

    Args:
        x: [k, ...], k >= 1, samples as the engine takes them.
        deadline: seconds on the scheduler's clock; at that time the request ends with
            `DeadlineExceeded`. None: it waits as long as it takes.
        arrived: seconds on the same clock, from which latency counts. None: when it is added.
        on_exit: called each time samples of this request have left.

    Raises:
        TypeError, ValueError: x is no tensor with samples.
    """

    def __init__(
        self,
        x: Tensor,
        *,
        deadline: float | None = None,
        arrived: float | None = None,
        on_exit: OnExit | None = None,
    ) -> None:
        checks.tensor("x", x)
        if x.dim() < 1 or len(x) < 1:
            raise ValueError(f"x: expected [k, ...] with k >= 1, got {checks.describe(x)}")
        self.x: Tensor | None = x  # until the scheduler has copied it
        self.size = len(x)
        self.deadline = deadline
        self.arrived = arrived
        self.on_exit = on_exit
        #: One of `OUTCOMES`, or None while it is under way.
        self.outcome: str | None = None
        self.error: BaseException | None = None
        #: Indices of the samples that have left, in the order in which they left.
        self.left: list[int] = []
        self._logits: Tensor | None = None  # [k, C]
        self._values = [(0, 0.0, 0)] * self.size  # prediction, confidence, exit of each sample

    @property
    def done(self) -> bool:
        return self.outcome is not None

    def record(
        self, indices: Sequence[int], logits: Tensor, values: Sequence[tuple[int, float, int]]
    ) -> None:
        """Keeps what m samples left with: logits [m, C], and (prediction, confidence, exit)."""
        if self._logits is None:
            self._logits = logits.new_empty(self.size, logits.shape[1])
        self._logits[torch.tensor(indices, device=logits.device)] = logits
        for i, value in zip(indices, values, strict=True):
            self._values[i] = value
        self.left += indices

    def output(self, indices: Sequence[int] | None = None) -> ELFOutput:
        """The values of samples that have left, in the order of `indices`; None: of all k.

        Raises:
            ValueError: one of them has not left.
        """
        wanted = range(self.size) if indices is None else indices
        missing = sorted(set(wanted) - set(self.left))
        if missing or self._logits is None:
            raise ValueError(f"indices: expected samples that have left, got {missing[:8]}")
        logits = self._logits
        if indices is not None:
            logits = logits[torch.tensor(indices, device=logits.device)]
        prediction, confidence, exit_index = zip(*(self._values[i] for i in wanted), strict=True)
        return ELFOutput(
            logits,
            torch.tensor(prediction, device=logits.device),
            torch.tensor(confidence, dtype=torch.float32, device=logits.device),
            torch.tensor(exit_index, device=logits.device),
            None,
        )
