"""The figures that elf_fast is held to, measured side by side and printed with their limits.

    python -m benchmarks.cpu.targets [--suite inference ...] [--full] [--output results/NAME.json]

Ratios only: each row measures two things in one run, in turn. A row that misses its figure is
printed like the others, marked.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from elf_fast import functional
from elf_fast.bench.timing import sample

from ..environment import environment, keep_memory
from ..row import HEADING, Row
from . import growth, networks, operators, startup

SUITES: dict[str, Callable[..., Iterator[Row]]] = {
    "kernels": operators.rows,
    "inference": networks.inference_rows,
    "training": networks.training_rows,
    "growth": growth.rows,
    "memory": growth.memory_rows,
    "startup": startup.rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--full", action="store_true", help="all shapes, and longer")
    parser.add_argument(
        "--output", type=Path, help="file of the rows; its other suites stay as they are"
    )
    options = parser.parse_args()
    keep_memory()
    results: dict[str, Any] = {}
    if options.output is not None and options.output.exists():
        results = json.loads(options.output.read_text())
    # The first second of a process is slow: 17 us instead of 13 for a small gate.
    logits = torch.randn(16, 10)
    sample({"warm-up": lambda: functional.exit_gate(logits, 0.9)}, seconds=2)
    print(HEADING)
    judged: list[bool] = []
    for suite in options.suite:
        rows = list(SUITES[suite](full=options.full))
        judged += [row.holds for row in rows if row.holds is not None]
        if options.output is not None:
            results[suite] = {
                "environment": environment(),
                "full": options.full,
                "rows": [asdict(row) | {"holds": row.holds} for row in rows],
            }
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{sum(judged)} figures hold, {len(judged) - sum(judged)} missed")


if __name__ == "__main__":
    main()
