"""Measures what elf_fast is held to on a CPU, and prints every row with its target.

    python -m benchmarks.cpu.targets [--suite inference ...] [--full] [--output FILE]

Every row is a ratio of two candidates that took turns in the same run. A row that misses its target
is printed like the others and marked MISSED; the exit status stays 0.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from elf_fast import functional
from elf_fast.timing import sample

from ..environment import environment, keep_memory
from ..row import HEADING, Row, counts
from . import growth, memory, networks, operators, serving, startup

SUITES: dict[str, Callable[..., Iterator[Row]]] = {
    "kernels": operators.rows,
    "inference": networks.inference_rows,
    "training": networks.training_rows,
    "growth": growth.rows,
    "memory": memory.rows,
    "serving": serving.rows,
    "startup": startup.rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu.targets", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--full", action="store_true", help="all shapes, each for a longer time")
    parser.add_argument(
        "--output", type=Path, help="JSON file for the rows; suites that do not run stay in it"
    )
    options = parser.parse_args()
    keep_memory()
    results: dict[str, Any] = {}
    if options.output is not None and options.output.exists():
        results = json.loads(options.output.read_text())
    # Calls in the first second of a process are slower: 17 us instead of 13 for a small gate.
    logits = torch.randn(16, 10)
    sample({"warm-up": lambda: functional.exit_gate(logits, 0.9)}, seconds=2)
    print(HEADING)
    measured: list[Row] = []
    for suite in options.suite:
        rows = list(SUITES[suite](full=options.full))
        measured += rows
        if options.output is not None:
            results[suite] = {
                "environment": environment(),
                "full": options.full,
                "rows": [row.as_json() for row in rows],
            }
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(results, indent=1) + "\n")
    held, missed = counts(measured)
    print(f"\n{held} targets hold, {missed} are missed")


if __name__ == "__main__":
    main()
