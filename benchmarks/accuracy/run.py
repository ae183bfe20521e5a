"""Trains the runs of the table that the results file lacks.

    python -m benchmarks.accuracy.run [--only FIELD=VALUE,...] [--jobs N] [--limit-minutes M]
    python -m benchmarks.accuracy.run --cifar10 FOLDER --work FOLDER [...]

It trains on digits, or on CIFAR-10 as an image folder (train/<class>/ and test/<class>/). Every run
uses one thread. When the command is stopped, the records of finished runs are in the file.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from . import cifar, results, runs, trial
from .runs import Run, select

Finished = tuple[Run, dict[str, Any]]


def missing(runs: Sequence[Run], path: Path) -> list[Run]:
    """The runs that the results file lacks, in the same order."""
    there = results.load(path)
    return [run for run in runs if run not in there]


def finished(
    runs: Sequence[Run], jobs: int, in_time: Callable[[], bool], perform: Callable[[Run], Any]
) -> Iterator[Finished]:
    """Each run with its record, in the order in which they end. No run begins after `in_time`
    returned False."""
    waiting = (run for run in runs if in_time())
    if jobs == 1:
        yield from ((run, perform(run)) for run in waiting)
        return
    with ProcessPoolExecutor(
        jobs, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        begun: dict[Future[Any], Run] = {}
        while True:
            begun |= {pool.submit(perform, run): run for run in islice(waiting, jobs - len(begun))}
            if not begun:
                return
            for future in wait(begun, return_when=FIRST_COMPLETED).done:
                yield begun.pop(future), future.result()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.run", description=__doc__)
    parser.add_argument("--only", action="append", default=[], metavar="FIELD=VALUE,...")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit-minutes", type=float, default=float("inf"))
    parser.add_argument("--cifar10", type=Path, metavar="FOLDER", help="images to train on")
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="folder of the trainings with --cifar10"
    )
    parser.add_argument("--output", type=Path, help="results file")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs: expected a positive integer, got {options.jobs}")
    if (options.cifar10 is None) != (options.work is None):
        parser.error("--cifar10, --work: expected both or neither")
    table, path, perform = runs.table(), results.PATH, trial.perform
    if options.cifar10 is not None:
        table, path = cifar.table(), cifar.PATH
        perform = partial(cifar.perform, images=options.cifar10, work=options.work)
    path = options.output or path
    try:
        todo = missing(select(table, options.only), path)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    end = time.monotonic() + 60 * options.limit_minutes
    done = 0
    for run, record in finished(todo, options.jobs, lambda: time.monotonic() < end, perform):
        results.add(run, record, path)
        done += 1
        accuracy = "/".join(f"{100 * t['overall']:.1f}" for t in record["test"].values())
        print(f"{done}/{len(todo)} {run}: {accuracy}%", flush=True)
    print(f"{len(todo) - done} runs are missing")


if __name__ == "__main__":
    main()
