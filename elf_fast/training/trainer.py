"""The trainer behind `elf-fast train`: one loop for networks with and without exits, on one process
or on those that torchrun started, which goes on after an interruption as if there had been none."""

from __future__ import annotations

import contextlib
import copy
import errno
import importlib
import json
import math
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import __version__
from ..data import DataError, ImageLoader, LabelledImages
from ..flops import count_flops
from ..losses import DeferredReweighting
from ..modules import ELF
from . import build, calibrate, checkpoint, distributed, restore, snapshot
from .config import TrainConfig, from_dict, load_yaml, to_dict, to_yaml
from .distributed import Ranks
from .ema import Average
from .evaluate import (
    NETWORK,
    autocast,
    evaluate,
    evaluation_loader,
    nothing_readable,
    sample,
)
from .log import Log
from .position import Position, Totals

CONFIG, RESULTS, CHECKPOINTS = "config.yaml", "metrics.json", "checkpoints"
#: Metrics that the record of an epoch leaves out: there may be thousands of classes.
_BY_CLASS = ("per_class", "exit_shares_by_class")


class NonFiniteError(ArithmeticError):
    """The loss or a weight became NaN or infinite; the message names the step and what is left."""


def train(config: TrainConfig, *, resume: bool = False, console: Console | None = None) -> dict:
    """Trains as the settings say, and returns what it writes to <output>/metrics.json.

    Args:
        resume: go on with the run in config.output from its newest good checkpoint.

    Raises:
        FileExistsError: config.output holds a run, and `resume` is False.
        NonFiniteError: the loss or a weight became NaN or infinite.
        ValueError: settings that do not fit each other, the data or the checkpoint.
        DataError: no image to evaluate on can be read.
    """
    with distributed.ranks(config.device) as ranks:
        trainer = Trainer(config, ranks, console=console)
        if resume:
            trainer.resume()
        return trainer.run()


def resumed_config(folder: Path, **overrides: Any) -> TrainConfig:
    """The settings that a run was started with, with some changed."""
    return from_dict({**load_yaml(folder / CONFIG), **overrides, "output": str(folder)})


class Trainer:
    """A run: its data, network, optimiser and position.

    `run` trains from where it is to the end. Nothing is written before that.
    """

    def __init__(
        self, config: TrainConfig, ranks: Ranks, *, console: Console | None = None
    ) -> None:
        self.config, self.ranks = config, ranks
        self.output = Path(config.output)
        self.console = (console or Console()) if ranks.is_first else Console(quiet=True)
        self.splits = build.load_splits(config)
        self.class_counts = self.splits.class_counts
        self.device = ranks.device
        if config.max_flops is not None and config.has_exits and self.splits.validation is None:
            raise ValueError(
                "max_flops: expected a validation part to choose the threshold on, as "
                f"--validation-fraction holds it out, got none and {config.max_flops}"
            )
        model = build.network(config, self.class_counts)
        if config.sync_bn and ranks.world_size > 1:
            if self.device.type != "cuda":
                raise ValueError(f"sync_bn: expected GPUs, as torch does, got {self.device}")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        memory_format = torch.channels_last if config.channels_last else torch.preserve_format
        self.model: ELF = model.to(self.device).to(memory_format=memory_format)
        self.flops = count_flops(self.model, sample(config, self.device))
        self.average = Average(self.model, config.model_ema_decay) if config.model_ema else None
        self.optimizer = build.optimizer(config, self.model)
        scaled = config.amp and config.amp_dtype == "float16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        if config.torchcompile is not None:
            if config.torchcompile not in torch.compiler.list_backends(exclude_tags=()):
                raise ValueError(
                    "torchcompile: expected a backend of torch.compile, such as "
                    f"{', '.join(torch.compiler.list_backends())}, got {config.torchcompile!r}"
                )
            for stage in self.model.stages:
                stage.compile(backend=config.torchcompile)
        self.learner: nn.Module = self.model
        if ranks.world_size > 1:
            self.learner = DistributedDataParallel(
                self.model, device_ids=[self.device] if self.device.type == "cuda" else None
            )
        # A seed of its own for every rank: for augmentation, and for dropout and its like.
        seed = config.seed * ranks.world_size + ranks.rank
        sampler = build.epoch_sampler(config, self.splits.train.targets)
        self._check_last_batch(len(sampler))
        self.loader = ImageLoader(
            self.splits.train,
            config.batch_size,
            sampler=sampler,
            workers=config.workers,
            seed=seed,
            channels_last=config.channels_last,
            pin_memory=self.device.type == "cuda",
            skip_errors=config.skip_errors,
            image_shape=(3, build.image_size(config), build.image_size(config)),
        )
        self.global_batch = config.batch_size * ranks.world_size
        self.validation = self._evaluation_loader(self.splits.validation)
        self.steps_per_epoch = math.ceil(len(self.loader) / config.grad_accum_steps)
        self.position = Position(self._no_totals())
        self.resumed = False
        self._named: set[str] = set()  # files that `_name_skipped` has shown
        for name, wanted in (("tensorboard", config.log_tensorboard), ("wandb", config.log_wandb)):
            if wanted:
                importlib.import_module(name)  # one that is missing is missed before a run starts
        torch.manual_seed(seed)

    def _check_last_batch(self, N: int) -> None:
        """Of N images per epoch and rank the last batch may have one, which a network cannot take
        that normalises single values over the batch: better heard of now than after an epoch."""
        if N % self.config.batch_size != 1 and self.config.batch_size > 1:
            return
        x, model = sample(self.config, self.device), copy.deepcopy(self.model).train()
        try:
            with torch.no_grad():
                for stage, head in zip(model.stages, model.heads, strict=True):
                    x = stage(x)
                    head(x)
        except ValueError as error:
            raise ValueError(
                f"batch_size: expected one that leaves more than one of {N} images for the last "
                f"batch, since {self.config.model} cannot normalise one over the batch, got "
                f"{self.config.batch_size}"
            ) from error

    def _evaluation_loader(self, part: LabelledImages | None) -> ImageLoader | None:
        return None if part is None else evaluation_loader(self.config, part, self.device)

    def _no_totals(self) -> Totals:
        return Totals([0] * len(self.model.stages))

    # Checkpoints

    def resume(self) -> None:
        """Goes on from the newest good checkpoint of the run in config.output; from the start if
        it has written none yet.

        Raises:
            CheckpointError: all of them are damaged, it does not fit the settings, or ranks see
                different ones.
        """
        self.resumed = True
        folder = self.output / CHECKPOINTS
        found, refused = snapshot.newest(folder)
        # A barrier, too: the first one renames when all have read.
        names = self.ranks.gather("none" if found is None else found.path.name)
        if len(set(names)) > 1:
            raise checkpoint.CheckpointError(
                f"{folder}: expected all processes to read the same checkpoint, got "
                f"{', '.join(names)}; the folder must be one that all of them see"
            )
        if refused and found is None:
            raise checkpoint.CheckpointError(
                f"{folder}: expected a good checkpoint, got none: {'; '.join(map(str, refused))}"
            )
        if self.ranks.is_first:
            snapshot.set_aside(folder, found)
        for error in refused:
            self.console.print(f"refused: {error}", highlight=False, soft_wrap=True)
        if found is None:
            self.console.print("no checkpoint yet: the run starts anew", highlight=False)
            return
        self._restore(found)
        self.console.print(f"goes on from {found.path}", highlight=False, soft_wrap=True)

    def _restore(self, saved: snapshot.Snapshot) -> None:
        state = saved.state
        restore.check_settings(saved, self.config, self.global_batch)
        try:
            restore.load_learnt(self.model, saved.weights)
            if self.average is not None and saved.average is not None:
                restore.load_learnt(self.average.model, saved.average)
            restore.load_progress(self.optimizer, state["optimizer"])
            if state["scaler"]:  # empty, of a run that scaled no loss
                self.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError) as error:
            raise checkpoint.CheckpointError(
                f"{saved.path}: does not fit the network and optimiser of these settings "
                f"({checkpoint.misfit(error)})"
            ) from error
        # The sums are those of all ranks: the first one takes them over.
        sums = Totals(**state["position"]["totals"])
        totals = sums if self.ranks.is_first else self._no_totals()
        self.position = p = Position(**{**state["position"], "totals": totals})
        self._reweight_loss(p.epoch if p.samples else p.epoch - 1)
        if len(state["random"]) == self.ranks.world_size:
            restore.set_random_state(state["random"][self.ranks.rank], self.device)

    def save(self) -> None:
        """Writes a checkpoint of the run as it is.

        Raises:
            NonFiniteError: a weight is NaN or infinite; nothing is written.
        """
        if not all(bool(w.isfinite().all()) for w in self.model.parameters()):
            raise self._non_finite("a weight is NaN or infinite after")
        totals = self.position.totals.over(self.ranks)
        random = self.ranks.gather(restore.random_state(self.device))
        if not self.ranks.is_first:
            return
        state = {
            "position": {**asdict(self.position), "totals": asdict(totals)},
            "global_batch": self.global_batch,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random,
        }
        snapshot.save(
            self.output / CHECKPOINTS,
            self.position.step,
            self.model.state_dict(),
            None if self.average is None else self.average.model.state_dict(),
            state,
            self._metadata(),
        )

    def _metadata(self) -> dict[str, Any]:
        return {
            "network": NETWORK,
            "config": to_dict(self.config),
            "class_counts": self.class_counts,
            "class_names": self.splits.class_names,
            "seed": self.config.seed,
            "versions": {"elf_fast": __version__, "torch": torch.__version__},
        }

    # Training

    def run(self) -> dict[str, Any]:
        """Trains to the end, calibrates, evaluates once, and writes the results."""
        config, p = self.config, self.position
        if self.ranks.is_first:
            self._claim_folder()
        with Log(
            config,
            self.console,
            batches_per_epoch=len(self.loader),
            purge_step=p.step + 1,
            active=self.ranks.is_first,
        ) as log:
            while p.epoch < config.epochs:
                self._epoch(log)
                if p.epoch % config.checkpoint_epochs == 0 or p.epoch == config.epochs:
                    self.save()
        return self._finish()

    def _claim_folder(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        if not self.resumed and (self.output / CONFIG).exists():
            why = "holds a run already: go on with it by --resume, or choose another folder"
            raise FileExistsError(errno.EEXIST, why, str(self.output))
        for leftover in self.output.glob("*.partial"):  # of a kill
            leftover.unlink()
        checkpoint.write(self.output / CONFIG, to_yaml(self.config).encode())

    def _epoch(self, log: Log) -> None:
        config, p, loader = self.config, self.position, self.loader
        self._reweight_loss(p.epoch)
        loader.set_epoch(p.epoch, start=p.samples // self.global_batch)
        self.model.train()
        log.begin_epoch(p.epoch, loader.position)
        rate, images, start = 0.0, 0, time.perf_counter()
        batches, skipped = iter(loader), loader.skipped.total()
        while group := list(islice(batches, config.grad_accum_steps)):
            images += self._step(group)
            p.samples = loader.position * self.global_batch
            p.totals.skipped += loader.skipped.total() - skipped
            skipped = loader.skipped.total()
            rate = images / (time.perf_counter() - start)
            log.batch(loader.position, {**p.totals.means(), "images_per_second": rate})
            if config.checkpoint_steps and p.step % config.checkpoint_steps == 0:
                self.save()
        totals = p.totals.over(self.ranks)
        p.epoch, p.samples, p.totals = p.epoch + 1, 0, self._no_totals()
        record = {
            "epoch": p.epoch,
            "step": p.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            **totals.means(),
            "skipped": totals.skipped,
            "images_per_second": rate,
        }
        if self.validation is not None and p.epoch % config.val_interval == 0:
            metrics = self._evaluate(self.validation)
            record["validation"] = {k: v for k, v in metrics.items() if k not in _BY_CLASS}
        p.history.append(record)
        log.epoch(record)
        self._name_skipped(loader)

    def _reweight_loss(self, epoch: int) -> None:
        """Gives a loss with deferred weights those of an epoch, in the average's copy, too."""
        for model in (self.model, self.result):
            if isinstance(model.exit_loss, DeferredReweighting):
                model.exit_loss.set_epoch(epoch)

    def _step(self, group: list[tuple[Tensor, Tensor]]) -> int:
        """One step of the optimiser on the mean loss over a group of batches, whose samples on all
        ranks it returns. Where nobody has one, the step is counted and not made."""
        config, p = self.config, self.position
        # Ranks may have unequally many: those that lost images to `skip_errors` have fewer.
        sizes = self.ranks.total(torch.tensor([len(targets) for _, targets in group])).tolist()
        batches = [(*batch, n) for batch, n in zip(group, sizes, strict=True) if n]
        N = sum(sizes)
        if not batches:
            p.step += 1
            return 0
        # By what is done of the epochs: p.step may count larger or smaller global batches, too.
        done = p.samples // (self.global_batch * config.grad_accum_steps)
        step = p.epoch * self.steps_per_epoch + done
        lr = build.learning_rate(config, step, self.steps_per_epoch)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = lr
        for number, (images, targets, n) in enumerate(batches, start=1):
            images = images.to(self.device, non_blocking=True)
            targets = targets.to(self.device, non_blocking=True)
            with self._synchronised(number == len(batches)):
                with autocast(config, self.device):
                    out = self.learner(images, targets)
                loss = out.loss.item()
                if not math.isfinite(loss):
                    p.step += 1
                    raise self._non_finite(f"the loss is {loss} in")
                self.scaler.scale(out.loss * (n / N)).backward()
            # The loss is R / n times the sum over the samples here: docs/distributed.md.
            p.totals.add(out, targets, loss * n / self.ranks.world_size)
        if config.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        p.step += 1
        if self.average is not None:
            self.average.update(self.model)
        return N

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager:
        """Gradients are averaged over the ranks in the last batch of a group only."""
        if isinstance(self.learner, DistributedDataParallel) and not last:
            return self.learner.no_sync()
        return contextlib.nullcontext()

    def _non_finite(self, what: str) -> NonFiniteError:
        p = self.position
        return NonFiniteError(
            f"{what} step {p.step} (epoch {p.epoch + 1}, learning rate "
            f"{self.optimizer.param_groups[0]['lr']:g}): the run stops, and the checkpoints in "
            f"{self.output / CHECKPOINTS} are from before. A lower --lr, a longer --warmup-epochs "
            "or --clip-grad may help"
        )

    # Results

    @property
    def result(self) -> ELF:
        """The network that counts: the averaged one where there is one."""
        return self.model if self.average is None else self.average.model

    def _evaluate(self, loader: ImageLoader) -> dict[str, Any]:
        self.ranks.share_buffers(self.result)
        try:
            metrics = evaluate(self.config, self.result, loader, self.class_counts, self.flops)
        except DataError:  # which all ranks raise
            self._name_skipped(loader)
            raise
        self._name_skipped(loader)
        return metrics

    def _name_skipped(self, loader: ImageLoader) -> None:
        """Shows the files that any rank could not read, each once."""
        if self.config.skip_errors:
            found = set().union(*self.ranks.gather(set(loader.skipped)))
            for path in sorted(found - self._named):
                line = Text(f"left out, cannot be read: {path}")
                self.console.print(line, soft_wrap=True)
            self._named |= found

    def _finish(self) -> dict[str, Any]:
        results: dict[str, Any] = {
            "versions": self._metadata()["versions"],
            "settings": to_dict(self.config),
            "class_counts": self.class_counts,
            "split": {
                name: None if (part := getattr(self.splits, name)) is None else len(part)
                for name in ("train", "validation", "test")
            },
        }
        if self.validation is not None:
            if self.config.calibrate and len(self.model.stages) > 1:
                results["calibration"] = self._calibrate(self.validation)
            results["validation"] = self._evaluate(self.validation)
        if self.ranks.is_first:
            weights = self.result.state_dict()
            checkpoint.save(self.output / snapshot.WEIGHTS, weights, self._metadata())
        test = self._evaluation_loader(self.splits.test)
        if test is not None:
            results["test"] = self._evaluate(test)
        results["history"] = self.position.history
        if self.ranks.is_first:
            described = json.dumps(results, indent=1, allow_nan=False) + "\n"
            checkpoint.write(self.output / RESULTS, described.encode())
        return results

    def _calibrate(self, validation: ImageLoader) -> dict[str, Any]:
        """Sets the threshold of all exits from validation, and says what it gave there."""
        model = self.result
        self.ranks.share_buffers(model)
        with autocast(self.config, self.device):
            own = calibrate.exit_table(model, validation)
        tables = self.ranks.gather(own)
        table = calibrate.ExitTable(
            torch.cat([t.confidence for t in tables], 1),
            torch.cat([t.correct for t in tables], 1),
            own.criterion,
        )
        if not table.confidence.shape[1]:
            self._name_skipped(validation)
            raise nothing_readable(validation)
        points = calibrate.sweep(table, self.flops)
        share = math.inf if self.config.max_flops is None else self.config.max_flops
        chosen = calibrate.choose(points, share * self.flops.without_exits)
        model.thresholds.fill_(chosen.threshold)
        never = points[-1]
        return {
            "threshold": chosen.threshold if math.isfinite(chosen.threshold) else None,
            "accuracy": chosen.accuracy,
            "accuracy_exits_off": never.accuracy,
            "flops_share": chosen.flops / self.flops.without_exits,
        }
