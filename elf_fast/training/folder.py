"""The folder of a run: who may write into it, and when it is free for a new run."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from ..runs import card, description, files
from ..runs.checkpoints import WEIGHTS
from ..runs.config import TrainConfig
from ..runs.lock import Lock
from ..runs.opening import CHECKPOINTS
from ..runs.plain import to_yaml
from .processes import Processes
from .results import RESULTS

CONFIG = "config.yaml"


class RunFolder:
    """Only the first process locks the folder and writes. In others the methods do nothing."""

    def __init__(self, path: Path, processes: Processes) -> None:
        self.path, self.is_first = path, processes.is_first
        self._lock: Lock | None = None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """No other run may write into the folder inside the context.

        Raises:
            FileExistsError: another run does.
        """
        if not self.is_first:
            yield
            return
        with Lock(self.path) as lock:
            self._lock = lock
            try:
                yield
            finally:
                self._lock = None

    def check(self) -> None:
        """Raises FileNotFoundError if the folder was deleted since it was locked."""
        if self._lock is not None:
            self._lock.check()

    def claim(self, config: TrainConfig, *, resumed: bool) -> None:
        """Writes the settings of the run. A folder in which a run failed before it had written a
        checkpoint is free for a new one.

        Raises:
            FileExistsError: it holds a run, and this one does not resume it.
        """
        if not self.is_first:
            return
        settings = self.path / CONFIG
        if not resumed:
            if self._holds_a_run():
                why = "holds a run already: go on with it by --resume, or choose another folder"
                raise FileExistsError(errno.EEXIST, why, str(self.path))
            kept = files.previous(settings)
            if settings.exists() and not kept.exists():  # it may be the user's own
                os.replace(settings, kept)
        files.remove_partial(self.path, (CONFIG, RESULTS, WEIGHTS, description.CONFIG, card.NAME))
        (self.path / CHECKPOINTS).mkdir(exist_ok=True)  # by both a folder is known as that of a run
        files.write(settings, to_yaml(config).encode())

    def _holds_a_run(self) -> bool:
        saved = (self.path / CHECKPOINTS).glob("step-*")
        return any(path.suffix != ".partial" for path in saved) or any(
            (self.path / name).exists() for name in (WEIGHTS, RESULTS)
        )
