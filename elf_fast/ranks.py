"""A training batch that is spread over several ranks, and the collectives that it needs.

They run only while an ELF trains inside `torch.nn.parallel.DistributedDataParallel`. Evaluation and
training outside of it run no collective, even if a process group exists.
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

#: Returns the DistributedDataParallel whose forward pass is running in this process, or None. It is
#: private: torch (2.11 and 2.14) has it for its compiler, and no public function for the same.
_running_ddp = getattr(DistributedDataParallel, "_get_active_ddp_module", None)


class Batch:
    """A batch of N samples that are all on this rank."""

    shared = False

    def __init__(self, N: int) -> None:
        self.N = N

    def entering(self) -> int:
        """`reaching` of the first stage."""
        return self.N

    def reaching(self, n: int) -> int:
        """Samples that normalisation sees in a stage which n local samples reach."""
        return n

    def mean(self, total: Tensor) -> Tensor:
        """The batch's mean loss [], from `total` [], the sum of this rank's per-sample losses."""
        return total / max(self.N, 1)


class SharedBatch(Batch):
    """The N samples of this rank in a global batch over the R ranks of `group`.

    N may differ between ranks. Every rank must create one and call `reaching` equally often,
    because both run collectives.

    Args:
        N: samples on this rank; 0 is allowed.
        device: a device that `group` communicates on.
        norm_group: the ranks over which SyncBatchNorm takes its statistics; None if the model has
            no SyncBatchNorm in training mode.
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
        # Asynchronous, because most ranks need the sum only at the end of the forward pass.
        self._sum = distributed.all_reduce(self._size, group=group, async_op=True)

    def entering(self) -> int:
        # Only a rank without samples needs the number of samples of all ranks, and waits for it.
        return self.N or (int(self.size()) if self.norm_group is not None else 0)

    def reaching(self, n: int) -> int:
        if self.norm_group is None:
            return n
        count = torch.full((), n, dtype=torch.int64, device=self._device)
        distributed.all_reduce(count, group=self.norm_group)
        return int(count)

    def size(self) -> Tensor:
        """Number of samples [] int64 in the global batch."""
        self._sum.wait()
        return self._size

    def mean(self, total: Tensor) -> Tensor:
        """`total` [], the sum of the losses of this rank's samples, times R / size. Averaged over
        the ranks, as DistributedDataParallel averages gradients, these values give the mean loss of
        the global batch."""
        return total * self._ranks / self.size().clamp_min(1)


def batch_of(model: nn.Module, x: Tensor) -> Batch:
    """The batch of x [N, ...] in the forward pass of `model`: a `SharedBatch` if x is this rank's
    part of a global batch, else a `Batch`.

    Raises:
        RuntimeError: in training with several ranks, if this version of torch cannot tell whether
            they share the batch.
    """
    # A process group alone does not mean a shared batch: one rank may train its own network. A
    # running forward pass of DistributedDataParallel does.
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
        # Without this error, training could hang or use wrong gradients.
        raise RuntimeError(
            "torch: expected DistributedDataParallel._get_active_ddp_module (as in 2.11 and 2.14), "
            "which tells an ELF in training whether ranks share its batch, got torch "
            f"{torch.__version__} without it; train in one process, or with another torch"
        )
    return None


@contextmanager
def batch_norm_without_samples(model: nn.Module, x: Tensor, *, reaching: int) -> Iterator[Tensor]:
    """Yields x [n, ...], on which a stage of `model` is to run inside the context. `reaching` is
    the number of samples of all ranks that reach the stage.

    For n = 0, BatchNorm is in evaluation mode, so it counts no batch. SyncBatchNorm stays in
    training mode if samples of other ranks reach the stage, because all ranks must join its
    collective. If none do, its running statistics would decay, so it is in evaluation mode, too.
    """
    if len(x):
        yield x
        return

    def rests(module: nn.Module) -> bool:
        synchronised = isinstance(module, nn.SyncBatchNorm)
        return isinstance(module, _BatchNorm) and not (reaching and synchronised)

    device = x.device.type
    with mode(model, training=False, only=rests):
        if reaching and torch.is_autocast_enabled(device):
            # SyncBatchNorm sends float32 statistics for half-precision samples, but for an empty
            # batch it uses its input's dtype (torch 2.14, torch/nn/modules/_functions.py).
            with torch.autocast(device, enabled=False):
                yield x.float()
        else:
            yield x
