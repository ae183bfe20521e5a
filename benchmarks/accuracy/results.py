"""The results file: a line of JSON for every finished run.

The lines are sorted. So the file does not depend on the order in which runs end, and files of
several machines can be merged line by line.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .runs import Run

PATH = Path(__file__).resolve().parents[1] / "results" / "accuracy-digits.jsonl"


def load(path: Path = PATH) -> dict[Run, dict[str, Any]]:
    """Every finished run and its record; none if there is no file. A last line that was cut short
    is left out, with a warning on stderr, so that the command trains that run again.

    Raises:
        ValueError: another line is not the record of a run, or two lines are of the same run.
    """
    records: dict[Run, dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            run = Run(**record["run"])
        except (ValueError, KeyError, TypeError) as error:
            if not line.endswith("\n"):
                print(f"{path}:{number}: cut short, left out", file=sys.stderr)
                break
            raise ValueError(
                f"{path}:{number}: expected the record of a run, got {line[:60]!r} ({error})"
            ) from error
        if run in records:
            raise ValueError(f"{path}:{number}: expected one record a run, got a second of {run}")
        records[run] = record
    return records


def add(run: Run, record: dict[str, Any], path: Path = PATH) -> None:
    """Adds the record of a finished run; a record that the file has stays. A new file is written,
    flushed to disk and renamed, so that the file is never incomplete. Several processes may add
    records at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        records = load(path)
        records.setdefault(run, {"run": asdict(run), **record})
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        with open(partial, "w", encoding="utf-8") as file:
            for key in sorted(records):
                file.write(json.dumps(records[key], allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
