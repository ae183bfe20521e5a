"""Batches of images, loaded by worker processes; all randomness depends on the seed alone."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import random
import signal
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, SequentialSampler

from .. import checks
from ..memory import is_lost_worker
from .images import DecodeError
from .splits import LabelledImages


class WorkerError(OSError):
    """A process that loads images has ended."""

    @classmethod
    def because(cls, reason: BaseException) -> WorkerError:
        return cls(
            "workers: expected the processes that load images to run, got an end "
            f"({str(reason).strip() or repr(reason)}); they may lack memory or shared memory "
            "(/dev/shm), and fewer --workers need less"
        )


class ImageLoader:
    """Iterates over batches (images [n, 3, H, W], targets [n] int64) of a data set.

    The augmentation of a batch depends on the seed, the epoch and the batch's number only, so it is
    the same with any number of workers and in a resumed run. This covers the generators of torch,
    NumPy and Python; the calling process's own keep their state.

    Args:
        sampler: the order of the samples; that of the data set if None.
        workers: processes that load, kept from epoch to epoch; 0 loads in the calling process.
        seed: of the augmentation. In distributed training give every rank its own.
        channels_last: the memory format of the images.
        drop_last, pin_memory: as in torch's DataLoader.
        skip_errors: leave out images that cannot be read, and count them in `skipped`. Otherwise
            the first one raises `DecodeError`.
        named: called with the message for every image that is left out, batch by batch.
        image_shape: (3, H, W). If given, a batch without a readable image is yielded with n = 0, so
            that all ranks run equally many steps. If None, the batch is left out.

    Attributes:
        position: batches of the epoch so far, those left out included. `set_epoch` with this as
            `start` continues after the last batch.
        skipped: how often each unreadable file was left out so far.
    """

    def __init__(
        self,
        dataset: LabelledImages,
        batch_size: int,
        *,
        sampler: Sampler[int] | Iterable[int] | None = None,
        drop_last: bool = False,
        workers: int = 0,
        seed: int = 0,
        channels_last: bool = False,
        pin_memory: bool = False,
        skip_errors: bool = False,
        named: Callable[[str], None] | None = None,
        image_shape: Sequence[int] | None = None,
    ) -> None:
        checks.at_least("seed", seed, 0)
        self.dataset = dataset
        self.sampler = SequentialSampler(dataset) if sampler is None else sampler
        self.skip_errors, self.named = skip_errors, named
        self.image_shape = image_shape
        self.position = 0
        self.skipped: Counter[str] = Counter()
        self._keys = _BatchKeys(BatchSampler(self.sampler, batch_size, drop_last), seed)
        self._loader = DataLoader(
            _BatchReader(dataset, channels_last),
            sampler=self._keys,
            batch_size=None,  # one key is one whole batch
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # else every epoch draws from torch's global one
        )

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Sets the epoch (0-based) of the next iteration, in the sampler, too.

        Args:
            start: batches to skip, to resume in the middle of an epoch. The sampler still gives the
                whole epoch's order; skipped batches are not loaded.
        """
        self._keys.epoch, self._keys.start = epoch, start
        self.position = start
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        """Batches of a whole epoch, before any is left out."""
        return len(self._keys.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """
        Raises:
            DecodeError: an image cannot be read, unless `skip_errors`.
            WorkerError: a worker has ended. Outside of the iteration torch may raise a RuntimeError
                for it, which `memory.is_lost_worker` recognises.
        """
        try:
            yield from self._batches()
        except RuntimeError as error:
            if not is_lost_worker(error):
                raise
            raise WorkerError.because(error) from error
        except (ConnectionError, EOFError) as error:  # a worker ended while it handed over a batch
            if not self._loader.num_workers or "in DataLoader worker process" in str(error):
                raise  # from the data set
            try:
                time.sleep(1)  # until the signal comes, which torch would else report later
            except RuntimeError as reason:
                raise WorkerError.because(reason) from reason
            raise WorkerError.because(error) from error

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        others = set(multiprocessing.active_children())
        batches = iter(self._loader)  # starts the workers, if they do not run yet
        _workers.update(set(multiprocessing.active_children()) - others)
        for number, batch in enumerate(batches, self._keys.start):
            self.position = number + 1
            if batch.unreadable and not self.skip_errors:
                raise DecodeError(*batch.unreadable[0])
            self.skipped.update(path for _, path in batch.unreadable)
            if self.named is not None:
                for message, _ in batch.unreadable:
                    self.named(message)
            if len(batch.targets):
                yield batch.images, batch.targets
            elif self.image_shape is not None:
                yield torch.empty(0, *self.image_shape), batch.targets


#: Workers of all loaders of this process.
_workers: weakref.WeakSet[BaseProcess] = weakref.WeakSet()


def _start_worker(worker: int) -> None:
    """Queues send SIGTERM and others to all processes of a job, and terminals SIGINT. A worker that
    ended at once would fail its parent, which may still have to save. So the parent ends it by
    another signal."""
    sys.excepthook = _unless_parent_stopped
    if hasattr(signal, "SIGUSR2"):  # not on Windows
        for ignored in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT):
            signal.signal(ignored, signal.SIG_IGN)
        signal.signal(signal.SIGUSR2, lambda number, frame: os._exit(0))


def _unless_parent_stopped(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Prints an error of a worker's thread, but not that the parent stopped in the middle of
    fetching a batch from it."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, traceback)


@atexit.register
def _end_workers() -> None:
    """Runs at exit before multiprocessing, which sends SIGTERM to the workers and waits for
    them."""
    for worker in list(_workers):
        if worker.is_alive() and worker.pid is not None and hasattr(signal, "SIGUSR2"):
            os.kill(worker.pid, signal.SIGUSR2)


class _Key(NamedTuple):
    """What a worker needs to load a batch."""

    seed: tuple[int, int, int]
    indices: list[int]


class _Batch(NamedTuple):
    images: Tensor  # [n, 3, H, W]
    targets: Tensor  # [n] int64
    # (message, path) of unreadable files, which the main process counts or raises. If the worker
    # raised instead, DataLoader would hide the message in the worker's traceback and make a
    # reference cycle that keeps the workers from ending when asked to.
    unreadable: list[tuple[str, str]]


class _BatchKeys(Sampler[_Key]):
    def __init__(self, batches: BatchSampler, seed: int) -> None:
        self.batches, self.seed = batches, seed
        self.epoch, self.start = 0, 0

    def __iter__(self) -> Iterator[_Key]:
        for number, indices in islice(enumerate(self.batches), self.start, None):
            yield _Key((self.seed, self.epoch, number), indices)


class _BatchReader(Dataset[_Batch]):
    """Loads the batch of a key; runs in the workers."""

    def __init__(self, dataset: LabelledImages, channels_last: bool) -> None:
        self.dataset = dataset
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __getitem__(self, key: _Key) -> _Batch:
        images, targets, unreadable = [], [], []
        with _seeded(key.seed):
            for index in key.indices:
                try:
                    image, target = self.dataset[index]
                except DecodeError as error:
                    unreadable.append((str(error), error.path))
                else:
                    images.append(image)
                    targets.append(target)
        if not images:
            return _Batch(torch.empty(0), torch.empty(0, dtype=torch.int64), unreadable)
        shape = (len(images), *images[0].shape)
        batch = torch.empty(shape, dtype=images[0].dtype, memory_format=self.memory_format)
        return _Batch(torch.stack(images, out=batch), torch.tensor(targets), unreadable)


@contextlib.contextmanager
def _seeded(seed: tuple[int, int, int]) -> Iterator[None]:
    """Seeds the generators of torch (CPU), NumPy and Python, and restores them at the end."""
    words = [int(word) for word in np.random.SeedSequence(seed).generate_state(3)]
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(words[0])
        np.random.seed(words[1])
        random.seed(words[2])
        try:
            yield
        finally:
            np.random.set_state(numpy)
            random.setstate(python)
