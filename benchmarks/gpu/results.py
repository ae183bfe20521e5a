"""The results file of a GPU. While workers run it also holds what the next worker needs to know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: Names of jobs: begun, and finished or given up.
PROGRESS = ("begun", "reported", "broken")


def new() -> dict[str, Any]:
    return {
        "environment": {},
        "ceilings": {},
        "rows": [],  # as `Row.as_json` has them
        "errors": [],  # "subject", "shape" and "error" of candidates and shapes
        "not run": [],  # names of jobs
        "begun": [],
        "reported": [],
        "broken": {},  # by job: errors of the candidates that made the device unusable
    }


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def write(path: Path, results: dict[str, Any]) -> None:
    """Replaces the file as a whole, so that a reader never finds half of it."""
    written = path.with_suffix(".part")
    written.write_text(json.dumps(results, indent=1) + "\n")
    written.replace(path)
