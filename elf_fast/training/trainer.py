"""The trainer behind `elf-fast train`: one loop for networks with and without exits, in one process
or in those that torchrun started. A resumed run ends with the result of an uninterrupted one."""

from __future__ import annotations

import contextlib
import copy
import importlib
import math
import os
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from .. import criteria, functional
from ..console import LastingConsole, say
from ..data import ImageLoader
from ..flops import Flops, count_flops
from ..memory import is_out_of_memory
from ..modules import ELF
from ..policy import one_number
from ..runs import checkpoints, class_weights, contents, initial
from ..runs.config import TrainConfig
from ..runs.datasets import blank_image, image_size, load_splits, preprocessing
from ..runs.description import RUN, Facts, entries
from ..runs.freezing import train_mode
from ..runs.networks import network
from ..runs.opening import CHECKPOINTS, FOLDERS, located
from ..runs.plain import from_run, load_yaml, to_dict
from . import resume, schedule
from .folder import CONFIG, RunFolder
from .learner import Learner
from .log import Log, introduction
from .processes import Processes, Stopped, joined
from .progress import Progress, Totals
from .results import Evaluator, write_results
from .stopping import Stop
from .unreadable import check_epoch

#: Metrics that the record of an epoch leaves out: there may be thousands of classes.
_BY_CLASS = ("per_class", "exit_shares_by_class")


class NonFiniteError(ArithmeticError):
    """The loss or a weight became NaN or infinite. The message names step and checkpoints."""


def train(
    config: TrainConfig, *, resume: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Trains as the settings say, and returns what it writes to `metrics.json`.

    Args:
        resume: continue the run in config.output from its newest good checkpoint.

    Raises:
        FileExistsError: config.output holds a run, and `resume` is False; or another run writes
            there.
        FileNotFoundError: config.output was deleted during the run.
        Stopped: SIGTERM, SIGHUP or SIGUSR1 came, and a checkpoint was written.
        NonFiniteError: the loss or a weight became NaN or infinite.
        ValueError: settings that do not fit each other, the data or the checkpoint.
        DataError: more than half of the images of an epoch or of an evaluation cannot be read, or
            none of a class or by one of the processes.
    """
    with joined(config.device) as processes:
        trainer = Trainer(config, processes, console=console)
        if resume:
            trainer.resume()
        return trainer.run()


def resumed_config(folder: Path, **overrides: Any) -> TrainConfig:
    """The settings that a run was started with, with some changed."""
    settings = located(folder, load_yaml(folder / CONFIG))
    return from_run(settings, **{**overrides, "output": str(folder)})


def _with_absolute_folders(config: TrainConfig) -> TrainConfig:
    """The settings as the run records them, so that it is resumed and evaluated from any folder."""
    names = (*FOLDERS, "init_from", "class_weights")
    given = {name: getattr(config, name) for name in names}
    return replace(config, **{k: os.path.abspath(v) for k, v in given.items() if v is not None})


class Trainer:
    """A run: its data, its network, its progress.

    `run` trains from the current step to the end. Nothing is written before it is called.

    Raises:
        ValueError: settings that do not fit each other, the data or the machine.
    """

    def __init__(
        self, config: TrainConfig, processes: Processes, *, console: Console | None = None
    ) -> None:
        self.processes = processes
        self.output = Path(config.output)
        self.folder = RunFolder(self.output, processes)
        self.console = (console or LastingConsole()) if processes.is_first else Console(quiet=True)
        self.splits = load_splits(config)  # by the paths as given, which messages name
        given, self.config = config, _with_absolute_folders(config)
        config = self.config
        say(self.console, self.splits.summary())
        self.contents = contents.describe(self.splits)
        self._check_same_data()  # before DistributedDataParallel, which fails on unequal classes
        self.class_counts = self.splits.class_counts
        if config.max_flops is not None and config.has_exits and self.splits.validation is None:
            raise ValueError(
                "max_flops: expected a validation part to choose the threshold on, as "
                f"--validation-fraction holds it out, got none and {config.max_flops}"
            )
        weights = None
        if given.class_weights is not None:
            weights = class_weights.read(given.class_weights, self.splits.class_names)
        model = network(config, self.class_counts, weights)
        # A run that resumes has its weights already, even if the file that it started from is gone.
        if not checkpoints.exist(self.output / CHECKPOINTS):
            loaded = initial.load_(model, given)
            if loaded is not None:
                say(self.console, str(loaded))
        self.learner = Learner(config, model, processes)
        for line in self.learner.summary():
            say(self.console, line)
        self._check_criterion()
        flops = count_flops(self.model, blank_image(config, processes.device))
        self._check_max_flops(flops)
        # Every process has its own seed for augmentation and for random layers such as dropout.
        seed = (config.seed * processes.world_size + processes.rank) % 2**64
        self.loader = self._training_loader(seed)
        # Now and in every process: with SyncBatchNorm the network communicates.
        self._leaves_out_lone = config.skip_errors and config.batch_size > 1 and self._needs_two()
        self.global_batch = config.batch_size * processes.world_size
        self.steps_per_epoch = math.ceil(len(self.loader) / config.grad_accum_steps)
        self.stop = Stop(processes)
        self.evaluator = Evaluator(
            config, self.class_counts, flops, processes, self.console, self.stop
        )
        self.validation = self.evaluator.loader(self.splits.validation)
        self.progress = Progress(self._no_totals())
        self.resumed = False
        self._saved: Any = None  # the progress that the newest checkpoint of this process holds
        for name, wanted in (("tensorboard", config.log_tensorboard), ("wandb", config.log_wandb)):
            if wanted:
                importlib.import_module(name)  # fail now if the logger isn't installed
        torch.manual_seed(seed)

    @property
    def model(self) -> ELF:
        return self.learner.model

    def _check_same_data(self) -> None:
        """Fails if processes, which may run on several machines, read different data."""
        own = (contents.fingerprint(self.contents), self.splits.summary())
        seen = dict(self.processes.gather(own))
        if len(seen) > 1:
            raise ValueError(
                "data_dir: expected all processes to read the same data, got "
                f"{len(seen)} kinds: {' | '.join(seen.values())}"
            )

    def _check_criterion(self) -> None:
        """Fails now if a kernel that serves this device does not compute the criterion."""
        criterion, device = self.config.criterion, self.processes.device
        if not isinstance(criterion, str):
            return
        logits, target = torch.zeros(1, len(self.class_counts), device=device), torch.zeros(1)
        off = criteria.by_name(criterion).off
        try:
            functional.exit_gate(logits, off, criterion=criterion)
            functional.exit_loss(
                logits, target.long().to(device), threshold=off, criterion=criterion
            )
        except (RuntimeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f"criterion: expected one that the kernels for {device} compute, got "
                f"{criterion!r} ({error})"
            ) from error

    def _check_max_flops(self, flops: Flops) -> None:
        """Fails now, not after training, if no threshold can be so cheap."""
        limit, thresholds = self.config.max_flops, self.model.thresholds
        if limit is None or not len(thresholds):
            return
        least = one_number.least_flops(flops, thresholds) / flops.without_exits
        if limit < least:
            raise ValueError(
                f"max_flops: expected at least {math.ceil(1000 * least) / 1000:g} (all leave at "
                f"the first exit), got {limit:g}"
            )

    def _training_loader(self, seed: int) -> ImageLoader:
        config = self.config
        sampler = schedule.epoch_sampler(config, self.splits.train.targets)
        self._check_last_batch(len(sampler))
        size = image_size(config)
        return ImageLoader(
            self.splits.train,
            config.batch_size,
            sampler=sampler,
            workers=config.workers,
            seed=seed,
            channels_last=config.channels_last,
            pin_memory=self.processes.device.type == "cuda",
            skip_errors=config.skip_errors,
            image_shape=(3, size, size),
        )

    def _check_last_batch(self, N: int) -> None:
        """Fails now, not after an epoch, if the last batch of N images per process and epoch has
        one image and the network cannot normalise one value per channel over the batch."""
        if N % self.config.batch_size != 1 and self.config.batch_size > 1:
            return
        if self._needs_two():
            raise ValueError(
                f"batch_size: expected one that leaves more than one of {N} images for the last "
                f"batch, since {self.config.model} cannot normalise one over the batch, got "
                f"{self.config.batch_size}"
            )

    def _needs_two(self) -> bool:
        """Whether the network cannot train on a batch of one image, because a layer normalises one
        value per channel over the batch."""
        x = blank_image(self.config, self.processes.device)
        model = copy.deepcopy(self.model)
        train_mode(model)
        try:
            with torch.no_grad():
                for stage, head in zip(model.stages, model.heads, strict=True):
                    x = stage(x)
                    head(x)
        except ValueError:
            return True
        return False

    def _trainable(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The batch. If only one of its images could be read and the network needs two, that one is
        left out as well."""
        images, targets = batch
        if len(targets) == 1 and self._leaves_out_lone:
            return images[:0], targets[:0]
        return batch

    def _has_read_half(self) -> bool:
        """Whether at least half of the epoch's images so far could be read. Else no checkpoint is
        written, so that the run resumes from before the images went missing."""
        totals = self.progress.totals.over(self.processes)
        return sum(totals.exits) >= totals.skipped

    def _no_totals(self) -> Totals:
        return Totals([0] * len(self.model.stages))

    # Checkpoints

    def resume(self) -> None:
        """Continues from the newest good checkpoint of the run in config.output, or from the start
        if there is none yet.

        Raises:
            CheckpointError: all of them are damaged, it does not fit the settings, or processes
                see different ones.
        """
        self.resumed = True
        with self.folder.locked() if self.output.is_dir() else contextlib.nullcontext():
            found = resume.newest(self.output / CHECKPOINTS, self.processes, self.console)
        if found is None:
            say(self.console, f"{self.output} holds no checkpoint: a new run starts there")
            return
        contents.check_resumed(found.path, found.metadata, self.contents, self.config)
        self.progress = p = resume.restore(
            found, self.config, self.learner, self.processes, global_batch=self.global_batch
        )
        self.learner.set_epoch(p.epoch if p.samples else p.epoch - 1)
        say(self.console, f"goes on from {found.path}")

    def save(self) -> None:
        """Writes a checkpoint of the run as it is.

        Raises:
            NonFiniteError: a weight is NaN or infinite; nothing is written.
            FileNotFoundError: the run's folder was deleted.
        """
        self.folder.check()
        if not self.learner.is_finite():
            raise self._non_finite("a weight is NaN or infinite after")
        resume.save(
            self.output / CHECKPOINTS,
            self.learner,
            self.progress,
            self.processes,
            global_batch=self.global_batch,
            metadata=self.metadata(),
        )
        self._saved = self._position()

    def _position(self) -> tuple[int, int, int]:
        return self.progress.epoch, self.progress.samples, self.progress.step

    def metadata(self) -> dict[str, Any]:
        """The metadata of files of weights."""
        names, counts = self.contents["class_names"], self.class_counts
        return {
            "network": RUN,
            "config": to_dict(self.config),
            **entries(Facts(tuple(names), tuple(counts), preprocessing(self.config))),
            **self.contents,
            "seed": self.config.seed,
        }

    # Training

    def run(self) -> dict[str, Any]:
        """Trains to the end, calibrates, evaluates once, and writes the results."""
        with self.folder.locked(), self.stop:
            self.folder.claim(self.config, resumed=self.resumed)
            if idle := self.config.without_effect(
                has_momentum="momentum" in self.learner.optimizer.param_groups[0],
                has_validation=self.validation is not None,
            ):
                say(self.console, f"settings without effect: {', '.join(idle)}")
            for line in self._introduction():
                say(self.console, line)
            self._train()
            self.folder.check()
            return write_results(
                self.learner.result,
                self.evaluator,
                self.splits,
                validation=self.validation,
                history=self.progress.history,
                metadata=self.metadata(),
            )

    def _introduction(self) -> list[str]:
        config = self.config
        return introduction(
            config,
            parameters=sum(p.numel() for p in self.model.parameters()),
            flops=self.evaluator.flops,
            size=image_size(config),
            device=self.processes.device,
            steps=self.steps_per_epoch,
            calibrates=config.calibrate and config.has_exits and self.validation is not None,
        )

    def _train(self) -> None:
        """All epochs that are left."""
        config, p = self.config, self.progress
        with Log(
            config,
            self.console,
            batches_per_epoch=len(self.loader),
            purge_step=p.step + 1,
            active=self.processes.is_first,
        ) as log:
            while p.epoch < config.epochs:
                try:
                    self._epoch(log)
                except Stopped as stopped:
                    self._save_and_leave(stopped)
                    raise
                if p.epoch % config.checkpoint_epochs == 0 or p.epoch == config.epochs:
                    self.save()

    def _save_and_leave(self, stopped: Stopped) -> None:
        is_saved = self._saved == self._position()
        if not is_saved and self._has_read_half():
            self.save()
            is_saved = True
        self.processes.gather(None)  # wait for the checkpoint: torchrun ends all if one has left
        what = "its checkpoint is" if is_saved else "most images could not be read, so none is"
        say(
            self.console,
            f"{stopped.signal.name}: the run stops after step {self.progress.step}; {what} "
            f"written: go on with it by --resume {self.output}",
        )

    def _epoch(self, log: Log) -> None:
        config, p, loader = self.config, self.progress, self.loader
        self.learner.set_epoch(p.epoch)
        loader.set_epoch(p.epoch, start=p.samples // self.global_batch)
        train_mode(self.model)
        log.begin_epoch(p.epoch, loader.position)
        rate, images, start = 0.0, 0, time.perf_counter()
        own, is_whole = 0, p.samples == 0  # images that this process reads
        before, batches, skipped = loader.skipped.copy(), iter(loader), loader.skipped.total()
        while group := list(islice(batches, config.grad_accum_steps)):
            n = self.step(group)
            images, own = images + n, own + sum(len(targets) for _, targets in group)
            p.samples = loader.position * self.global_batch
            p.totals.skipped += loader.skipped.total() - skipped
            skipped = loader.skipped.total()
            rate = images / (time.perf_counter() - start)
            log.batch(loader.position, {**p.totals.means(), "images_per_second": rate})
            is_due = config.checkpoint_steps and p.step % config.checkpoint_steps == 0
            if is_due and n and self._has_read_half():
                self.save()
        totals = p.totals.over(self.processes)
        check_epoch(
            p.epoch + 1,
            totals,
            own if is_whole else None,
            loader,
            set(loader.skipped - before),
            self.splits.class_names,
            self.processes,
        )
        record = {
            "epoch": p.epoch + 1,
            "step": p.step,
            "lr": self.learner.lr,
            **totals.means(),
            "skipped": totals.skipped,
            "images_per_second": rate,
        }
        if self.validation is not None and (p.epoch + 1) % config.val_interval == 0:
            metrics = self.evaluator.metrics(self.learner.result, self.validation)
            record["validation"] = {k: v for k, v in metrics.items() if k not in _BY_CLASS}
        # Only now, so that a run which a signal stops in validation resumes with validation.
        p.epoch, p.samples, p.totals = p.epoch + 1, 0, self._no_totals()
        p.history.append(record)
        self.folder.check()  # TensorBoard's thread would fail with a traceback
        log.epoch(record)
        self.evaluator.name_skipped(loader)

    def step(self, group: list[tuple[Tensor, Tensor]]) -> int:
        """One step of the optimiser on the mean loss over a group of batches. Returns the samples
        of all processes. A step without samples is counted but changes nothing.

        Raises:
            NonFiniteError: the loss is NaN or infinite.
            Stopped: a process got a signal. The step is not made.
        """
        p, learner, device = self.progress, self.learner, self.processes.device
        # With `skip_errors`, processes may have different numbers of readable images.
        loaded = sum(len(targets) for _, targets in group)
        group = [self._trainable(batch) for batch in group]
        own = [*(len(targets) for _, targets in group), *self.stop.received]
        sums = self.processes.total(torch.tensor(own)).tolist()
        sizes, received = sums[: len(group)], sums[len(group) :]
        self.stop.check(received)
        p.step += 1
        p.totals.skipped += loaded - sum(len(targets) for _, targets in group)
        batches = [(*batch, n) for batch, n in zip(group, sizes, strict=True) if n]
        N = sum(sizes)
        if not batches:
            return 0
        learner.lr = self._learning_rate()
        for number, (images, targets, n) in enumerate(batches, start=1):
            images = images.to(device, non_blocking=True)
            targets = targets.to(device, non_blocking=True)
            # Gradients are averaged over the processes in the last batch of a group only.
            with learner.synchronised(number == len(batches)):
                out, targets = learner.forward(images, targets)
                assert out.loss is not None
                loss = out.loss.item()
                if not math.isfinite(loss):
                    raise self._non_finite(f"the loss is {loss} in")
                learner.backward(out.loss * (n / N))
            # The loss is R / n times the sum over the samples here: docs/distributed.md.
            p.totals.add(out, targets, loss * n / self.processes.world_size)
        learner.update()
        return N

    def _learning_rate(self) -> float:
        """The rate of the next step. It depends on the share of the epoch that is done, not on
        p.step, which may include steps of other batch sizes."""
        config, p = self.config, self.progress
        done = p.samples // (self.global_batch * config.grad_accum_steps)
        step = p.epoch * self.steps_per_epoch + done
        return schedule.learning_rate(config, step, self.steps_per_epoch)

    def _non_finite(self, what: str) -> NonFiniteError:
        p = self.progress
        return NonFiniteError(
            f"{what} step {p.step} (epoch {p.epoch + 1}, learning rate {self.learner.lr:g}): the "
            f"run stops, and the checkpoints in {self.output / CHECKPOINTS} are from before. A "
            "lower --lr, a longer --warmup-epochs or --clip-grad may help"
        )
