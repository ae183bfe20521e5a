"""Batches of images, loaded by worker processes; what is random depends on the seed alone."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, SequentialSampler

from .. import checks
from .images import DecodeError
from .splits import LabelledImages


class ImageLoader:
    """Iterates over batches (images [n, 3, H, W], targets [n] int64) of a data set.

    The augmentation of a batch follows from the seed, the epoch and the batch's number: it is the
    same with any number of workers and in a run that was resumed, and the generators of the calling
    process are left alone. It holds for torch's, NumPy's and Python's generators.

    Args:
        sampler: the order of the samples; the data set's own if None.
        workers: processes that load; 0 loads in this one. They live on from epoch to epoch.
        seed: of the augmentation. In distributed training give every rank its own.
        channels_last: the memory format of the images.
        drop_last, pin_memory: as in torch's DataLoader.
        skip_errors: leave out images that cannot be read, and count them in `skipped`. Otherwise
            the first one raises `DecodeError`.
        image_shape: (3, H, W). A batch of which no image can be read is then passed on with n = 0,
            so that ranks which wait for each other make equally many steps; None leaves it out.

    Attributes:
        position: batches of the epoch that were passed so far, those left out included: where
            `set_epoch` has to start to go on after the last batch.
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
        image_shape: Sequence[int] | None = None,
    ) -> None:
        checks.at_least("seed", seed, 0)
        self.dataset = dataset
        self.sampler = SequentialSampler(dataset) if sampler is None else sampler
        self.skip_errors = skip_errors
        self.image_shape = image_shape
        self.position = 0
        self.skipped: Counter[str] = Counter()
        self._keys = _BatchKeys(BatchSampler(self.sampler, batch_size, drop_last), seed)
        self._loader = DataLoader(
            _BatchReader(dataset, channels_last),
            sampler=self._keys,
            batch_size=None,  # a key already stands for a whole batch
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else every epoch draws from torch's own
        )

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Chooses the epoch (0-based) that the next iteration runs, in the sampler, too.

        Args:
            start: batches to pass over, for going on in the middle of an epoch. The sampler gives
                the whole epoch's order; what is passed over is not loaded.
        """
        self._keys.epoch, self._keys.start = epoch, start
        self.position = start
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        """Batches of a whole epoch, before any is left out."""
        return len(self._keys.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(self._loader, self._keys.start):
            self.position = number + 1
            if batch.unreadable and not self.skip_errors:
                raise DecodeError(*batch.unreadable[0])
            self.skipped.update(path for _, path in batch.unreadable)
            if len(batch.targets):
                yield batch.images, batch.targets
            elif self.image_shape is not None:
                yield torch.empty(0, *self.image_shape), batch.targets


class _Key(NamedTuple):
    """What a worker needs to know of a batch."""

    seed: tuple[int, int, int]
    indices: list[int]


class _Batch(NamedTuple):
    images: Tensor  # [n, 3, H, W]
    targets: Tensor  # [n] int64
    # (message, path) of files without an image. They travel with the batch and are counted, or
    # raised, in the main process: torch's own way, an exception, hides the message in a worker's
    # traceback and makes a reference cycle that keeps the workers from ending when asked to.
    unreadable: list[tuple[str, str]]


class _BatchKeys(Sampler[_Key]):
    def __init__(self, batches: BatchSampler, seed: int) -> None:
        self.batches, self.seed = batches, seed
        self.epoch, self.start = 0, 0

    def __iter__(self) -> Iterator[_Key]:
        for number, indices in islice(enumerate(self.batches), self.start, None):
            yield _Key((self.seed, self.epoch, number), indices)


class _BatchReader(Dataset[_Batch]):
    """Loads the batch that a key stands for; runs in the workers."""

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
    """Seeds the generators of torch (CPU), NumPy and Python; afterwards they are as before."""
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
