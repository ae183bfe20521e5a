"""Writes docs/performance.md and its plots from benchmarks/results/cpu-*.json and gpu-*.json.

python -m benchmarks.pages.performance
"""

from __future__ import annotations

import json
from pathlib import Path

from . import cpu, gpu

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"

ABOUT = """# Performance

`python -m benchmarks.pages.performance` writes this page from the results in `benchmarks/results/`.
Every row compares two candidates that took turns in the same run. *Ratio* is what the baseline
needs divided by what the subject needs (median and quartiles over the repetitions): above 1 the
subject is better. Some rows have a *target* that the ratio must reach.

Baselines: `reference` is plain PyTorch with boolean masks, which most users have today; `tuned
PyTorch` is the best that a good PyTorch programmer writes without kernels of their own; `full` is
the network without exits; `oracle` is its stages alone on batches that were compacted beforehand,
the least time that early exits can take (the *ratio* beside it is the exit efficiency); `padded`
drops no sample; `earlyon` is the package from PyPI, whose batched mode lets a batch leave only as a
whole. N is the batch size, s the share of samples that goes on after each exit. Networks are
untrained; temperatures and thresholds are set for s. At inference BatchNorm is folded into the
convolutions, for all candidates. An operator's limit is a `read-only pass` over its input, or a
`copy` of the bytes that it moves.
"""


def main() -> None:
    lines = [ABOUT]
    for kind, page in (("gpu", gpu.page), ("cpu", cpu.page)):
        for file in sorted(RESULTS.glob(f"{kind}-*.json")):
            lines += page(file.stem, json.loads(file.read_text()), DOCS)
    (DOCS / "performance.md").write_text("\n".join(lines).rstrip() + "\n")
    print(DOCS / "performance.md")


if __name__ == "__main__":
    main()
