"""The network that trains, and the steps of its optimiser."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..base import ELFOutput
from ..losses import DeferredReweighting
from ..modules import ELF
from ..runs.config import TrainConfig
from ..runs.evaluation import autocast
from . import schedule
from .ema import Average
from .mixing import Mixer, mixed_loss
from .processes import Processes


class Learner:
    """A network on its device with optimiser, loss scaler and weight average.

    Attributes:
        model: the network that trains.
        average: the average of its weights, or None.
        optimizer, scaler: torch's. The scaler acts only for float16.
        lr: the learning rate, which every group of parameters multiplies by its own factor.

    Raises:
        ValueError: settings that this device or the optimiser refuses.
    """

    def __init__(self, config: TrainConfig, model: ELF, processes: Processes) -> None:
        self.config, self.device = config, processes.device
        memory_format = torch.channels_last if config.channels_last else torch.preserve_format
        model = _synchronised(model, config, processes)
        self.model: ELF = model.to(self.device).to(memory_format=memory_format)
        self.average = Average(self.model, config.model_ema_decay) if config.model_ema else None
        self.optimizer = schedule.optimizer(config, self.model)
        self._mixer = Mixer(config) if config.mixes else None
        scaled = config.amp and config.amp_dtype == "float16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        if config.torchcompile is not None:
            for stage in self.model.stages:
                stage.compile(backend=config.torchcompile)
        self._module: nn.Module = self.model
        if processes.world_size > 1:
            self._module = DistributedDataParallel(
                self.model, device_ids=[self.device] if self.device.type == "cuda" else None
            )

    def summary(self) -> list[str]:
        """What is frozen, and how learning rates differ, if the settings ask for either."""
        lines = []
        if self.config.freeze_backbone is not None:
            total = sum(p.numel() for p in self.model.parameters())
            trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
            lines.append(f"{trained:,} of {total:,} parameters train, the others are frozen")
        if self.config.layer_decay != 1.0:
            scales = sorted({group["lr_scale"] for group in self.optimizer.param_groups})
            factors = ", ".join(f"{scale:.3g}" for scale in scales)
            lines.append(f"learning rate from the first layers to the last: lr times {factors}")
        return lines

    @property
    def result(self) -> ELF:
        """The network to evaluate and save: the averaged one if there is one."""
        return self.model if self.average is None else self.average.model

    @property
    def lr(self) -> float:
        # A resumed optimiser has it, too. The classifiers' own factor is 1, all others are smaller.
        return max(group["lr"] for group in self.optimizer.param_groups)

    @lr.setter
    def lr(self, value: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = value * group.get("lr_scale", 1.0)

    def forward(self, images: Tensor, targets: Tensor) -> tuple[ELFOutput, Tensor]:
        """The output for a batch, with its loss, and the targets [N] that it is compared with: of
        mixed images, those of the larger shares."""
        with contextlib.ExitStack() as stack:
            if self._mixer is not None and len(targets):
                batch = self._mixer(images, targets)
                stack.enter_context(mixed_loss(self.model, batch))
                images, targets = batch.images, batch.targets
            stack.enter_context(autocast(self.config, self.device))
            return self._module(images, targets), targets

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def update(self) -> None:
        """One step of the optimiser on the gradients gathered since the last."""
        if self.config.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(self.model)

    def synchronised(self, wanted: bool) -> contextlib.AbstractContextManager:
        """Whether the gradients of the batches inside are averaged over the processes."""
        if isinstance(self._module, DistributedDataParallel) and not wanted:
            return self._module.no_sync()
        return contextlib.nullcontext()

    def set_epoch(self, epoch: int) -> None:
        """Tells a loss with deferred class weights the epoch, also in the averaged model."""
        for model in (self.model, self.result):
            if isinstance(model.exit_loss, DeferredReweighting):
                model.exit_loss.set_epoch(epoch)

    def is_finite(self) -> bool:
        return all(bool(w.isfinite().all()) for w in self.model.parameters())


def _synchronised(model: ELF, config: TrainConfig, processes: Processes) -> ELF:
    """The model, its BatchNorm synchronised over processes if the settings ask for it."""
    if not config.sync_bn or processes.world_size == 1:
        return model
    if processes.device.type != "cuda":
        raise ValueError(f"sync_bn: expected GPUs, as torch does, got {processes.device}")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)
