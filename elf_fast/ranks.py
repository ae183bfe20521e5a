"""A training batch that lies on several ranks, and what its ranks ask each other.

They ask only while an ELF trains inside `torch.nn.parallel.DistributedDataParallel`. Evaluation,
and training outside of it, even where there is a process group, make no collective.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from .modes import mode

__all__ = ["Batch", "SharedBatch", "batch_norm_without_samples", "batch_of"]

#: Gives the DistributedDataParallel whose forward pass is running in this process, or None. torch
#: (2.11 and 2.14) keeps it for its own compiler, and has no public name for it.
_running_ddp = getattr(DistributedDataParallel, "_get_active_ddp_module", None)


class Batch:
    """A batch of N samples that are all here."""

    shared = False

    def __init__(self, N: int) -> None:
        self.N = N

    def entering(self) -> int:
        """As `reaching`, for the first stage."""
        return self.N

    def reaching(self, n: int) -> int:
        """Samples that normalisation sees in a stage which n local samples reach."""
        return n

    def mean(self, total: Tensor) -> Tensor:
        """The batch's loss [] from the sum [] of the losses of the samples here."""
        return total / max(self.N, 1)


class SharedBatch(Batch):
    """N samples of a global batch that is spread over the R ranks of `group`, unevenly perhaps.

    Every rank makes one, and asks for `reaching` equally often.

    Args:
        N: samples on this rank; 0 is allowed.
        device: one that `group` communicates on.
        norm_group: the ranks over which SyncBatchNorm takes its statistics; None: there is none.
    """

    shared = True

    def __init__(
        self,
        N: int,
        device: torch.device,
        group: distributed.ProcessGroup,
        norm_group: distributed.ProcessGroup | None,
    ) -> None:
        super().__init__(N)
        self.norm_group = norm_group
        self._device = device
        self._ranks = distributed.get_world_size(group)
        self._size = torch.full((), N, dtype=torch.int64, device=device)
        # Nobody needs the sum before the end of the forward pass, and no rank waits for it here.
        self._sum = distributed.all_reduce(self._size, group=group, async_op=True)

    def entering(self) -> int:
        # Only a rank without samples needs to know of the others, so only that one waits.
        return self.N or (int(self.size()) if self.norm_group is not None else 0)

    def reaching(self, n: int) -> int:
        if self.norm_group is None:
            return n
        count = torch.full((), n, dtype=torch.int64, device=self._device)
        distributed.all_reduce(count, group=self.norm_group)
        return int(count)

    def size(self) -> Tensor:
        """Samples [] int64 of the global batch."""
        self._sum.wait()
        return self._size

    def mean(self, total: Tensor) -> Tensor:
        """R / size times the sum [] of the losses of the samples here: what averages over the ranks
        to the loss of the global batch, as DistributedDataParallel averages gradients."""
        return total * self._ranks / self.size().clamp_min(1)


def batch_of(model: nn.Module, x: Tensor) -> Batch:
    """The batch that x [N, ...] is, or is this rank's part of, in the forward pass of `model`.

    Raises:
        RuntimeError: in training, where there are several ranks and this torch does not say whether
            they share the batch.
    """
    # Whether a process group exists is no sign: one rank may train a network of its own. That a
    # forward pass of DistributedDataParallel is running is one.
    ddp = _ddp_in_forward() if model.training else None
    if ddp is None:
        return Batch(len(x))
    norms = (m for m in model.modules() if isinstance(m, nn.SyncBatchNorm) and m.training)
    norm = next(norms, None)
    norm_group = None if norm is None else norm.process_group or distributed.group.WORLD
    return SharedBatch(len(x), x.device, ddp.process_group, norm_group)


def _ddp_in_forward() -> DistributedDataParallel | None:
    if _running_ddp is not None:
        return _running_ddp()
    grouped = distributed.is_available() and distributed.is_initialized()
    if grouped and distributed.get_world_size() > 1:
        # To go on would be to hang, or to train on wrong gradients.
        raise RuntimeError(
            "torch: expected DistributedDataParallel._get_active_ddp_module (in 2.11 and 2.14), by "
            "which an ELF in training knows whether ranks share its batch, got torch "
            f"{torch.__version__} without it; train in one process, or with another torch"
        )
    return None


@contextmanager
def batch_norm_without_samples(model: nn.Module, x: Tensor, *, reaching: int) -> Iterator[Tensor]:
    """Yields x for a stage of `model` to run on while the context lasts. Without samples in x,
    BatchNorm counts no batch, and SyncBatchNorm takes part only where `reaching` samples of other
    ranks reach the stage: where nobody's do, its running statistics would decay."""
    if len(x):
        yield x
        return

    def rests(module: nn.Module) -> bool:
        synchronised = isinstance(module, nn.SyncBatchNorm)
        return isinstance(module, _BatchNorm) and not (reaching and synchronised)

    device = x.device.type
    with mode(model, training=False, only=rests):
        if reaching and torch.is_autocast_enabled(device):
            # SyncBatchNorm sends the statistics of half-precision samples as float32, but those of
            # no samples in the dtype of its input (torch 2.14, torch/nn/modules/_functions.py).
            with torch.autocast(device, enabled=False):
                yield x.float()
        else:
            yield x
