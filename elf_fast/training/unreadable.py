"""When a run that leaves out images that it cannot read (`skip_errors`) has to stop."""

from __future__ import annotations

from ..data import DataError, ImageLoader
from ..runs.evaluation import check_readable
from .processes import Processes
from .progress import Totals

_SHOWN = 5


def check_epoch(
    epoch: int,
    totals: Totals,
    own: int | None,
    loader: ImageLoader,
    own_unreadable: set[str],
    class_names: list[str],
    processes: Processes,
) -> None:
    """Checks what a finished epoch of training has read. Every process calls this, and all of them
    raise.

    Args:
        epoch: its number, from 1.
        totals: of the epoch over all processes.
        own: images that this process read; None if it resumed in the middle of the epoch.
        own_unreadable: names of the images that this process could not read in this epoch.
        class_names: [C].

    Raises:
        DataError: more than half of the images could not be read, or none by one of the processes,
            or none of a class.
    """
    if not totals.skipped:
        return
    unreadable: set[str] = set().union(*processes.gather(own_unreadable))
    read = sum(totals.exits)
    check_readable(f"epoch {epoch}", read, read + totals.skipped, unreadable)
    shares = processes.gather(own)
    if 0 in shares:
        raise DataError(
            f"epoch {epoch}: expected every process to read images, got none in process "
            f"{shares.index(0)} of {len(shares)}"
        )
    lost = _without_images(loader, unreadable, class_names)
    if lost:
        more = ", ..." if len(lost) > _SHOWN else ""
        raise DataError(
            f"epoch {epoch}: expected readable images of every class, got none of "
            f"{', '.join(lost[:_SHOWN])}{more}; repair the files, or start a new run without "
            "these classes"
        )


def _without_images(loader: ImageLoader, unreadable: set[str], class_names: list[str]) -> list[str]:
    """The classes all of whose files are unreadable."""
    paths = getattr(loader.dataset, "paths", None)
    if paths is None:  # a data set that is no set of files
        return []
    targets = loader.dataset.targets.tolist()
    read = {c for path, c in zip(paths, targets, strict=True) if path not in unreadable}
    return [name for c, name in enumerate(class_names) if c not in read]
