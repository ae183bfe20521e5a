"""The figures that the kernels are held to, measured side by side and printed with their limits.

    python benchmarks/figures.py [--output benchmarks/results/NAME.json]

Ratios only: each row times two things in one run, interleaved. A row that
misses its figure is printed like the others, marked.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from baselines import plain_gate, read_only

from elf_fast import functional, ops, reference
from elf_fast.bench.timing import Timing, interleaved


@dataclass
class Row:
    name: str
    baseline: str
    shape: str
    ratio: (
        float  # how often the subject fits into the baseline's time, or the reverse: see `figure`
    )
    figure: str
    holds: bool | None  # None: no figure is set, the row informs
    subject: Timing
    other: Timing

    def line(self) -> str:
        mark = {True: "holds", False: "MISSED", None: ""}[self.holds]
        return (
            f"{self.name:28} {self.baseline:16} {self.shape:34} {self.ratio:6.2f}x"
            f"  {self.figure:14} {mark:7} {self.subject!s:>24} us | {self.other!s:>26} us"
        )


def faster(
    rows: list[Row], name: str, baseline: str, shape: str, subject: Callable[[], Any],
    other: Callable[[], Any], least: float | None,
) -> None:  # fmt: skip
    """Baseline's time over the subject's, to be at least `least`."""
    t = interleaved({"subject": subject, "other": other})
    ratio = t["other"].median / t["subject"].median
    figure = "" if least is None else f">= {least:g}x faster"
    holds = None if least is None else ratio >= least
    if least == 1.0:  # as fast as the other: medians of equals fall on either side
        figure = "no slower"
        holds = t["subject"].low <= t["other"].high
    rows.append(Row(name, baseline, shape, ratio, figure, holds, t["subject"], t["other"]))
    print(rows[-1].line(), flush=True)


def within(
    rows: list[Row], name: str, baseline: str, shape: str, subject: Callable[[], Any],
    other: Callable[[], Any], most: float | None,
) -> None:  # fmt: skip
    """The subject's time over the baseline's, to be at most `most`."""
    t = interleaved({"subject": subject, "other": other})
    ratio = t["subject"].median / t["other"].median
    figure = "" if most is None else f"<= {most:g}x"
    holds = None if most is None else ratio <= most
    rows.append(Row(name, baseline, shape, ratio, figure, holds, t["subject"], t["other"]))
    print(rows[-1].line(), flush=True)


def gate_rows(rows: list[Row]) -> None:
    t, T = torch.tensor(0.9), torch.tensor(1.0)
    for N, C, least in ((16, 10, 2.0), (64, 100, 2.0), (256, 1000, 5.0), (1024, 1000, None)):
        x = torch.randn(N, C, generator=torch.Generator().manual_seed(0)) * 3
        shape = f"[{N}, {C}]"
        assert torch.equal(
            functional.exit_gate(x, 0.9).survivors, reference.exit_gate(x, 0.9).survivors
        )

        def gate(x=x):
            return functional.exit_gate(x, 0.9)

        def early(x=x):
            return ops.exit_gate(x, t, T, 0, None, True)

        with torch.inference_mode():
            faster(rows, "functional.exit_gate", "reference", shape, gate,
                   lambda x=x: reference.exit_gate(x, 0.9), least)  # fmt: skip
            faster(rows, "functional.exit_gate", "plain PyTorch", shape, gate,
                   lambda x=x: plain_gate(x, 0.9), None)  # fmt: skip
            most = 3.0 if N == 1024 else None
            within(rows, "functional.exit_gate", "read-only pass", shape, gate,
                   lambda x=x: read_only(x), most)  # fmt: skip
            within(rows, "ops.exit_gate, early stop", "read-only pass", shape, early,
                   lambda x=x: read_only(x), None)  # fmt: skip


def compact_rows(rows: list[Row]) -> None:
    for layer, size in (
        ("ResNet-32 stage 1", (64, 16, 32, 32)),
        ("ResNet-50 layer2", (32, 512, 28, 28)),
        ("ResNet-50 layer4", (64, 2048, 7, 7)),
    ):
        for layout, least in ((torch.contiguous_format, 1.0), (torch.channels_last, 5.0)):
            x = torch.randn(size).to(memory_format=layout)
            survivors = torch.arange(0, size[0], 2)
            shape = f"{layer} {str(layout).removeprefix('torch.').removesuffix('_format')}"
            with torch.inference_mode():
                assert torch.equal(functional.compact(x, survivors), x[survivors])
                for name, f, figure in (
                    ("ops.compact, half", ops.compact, least),
                    ("functional.compact, half", functional.compact, None),
                ):
                    faster(rows, name, "index_select", shape,
                           lambda f=f, x=x, s=survivors: f(x, s),
                           lambda x=x, s=survivors: x.index_select(0, s), figure)  # fmt: skip
                faster(rows, "ops.compact_, half", "ops.compact", shape,
                       lambda x=x, s=survivors: ops.compact_(x, s),
                       lambda x=x, s=survivors: ops.compact(x, s), None)  # fmt: skip


def head_rows(rows: list[Row]) -> None:
    for layer, size in (
        ("digits stage 2", (256, 64, 4, 4)),
        ("ResNet-32 stage 1", (64, 16, 32, 32)),
        ("ResNet-50 layer4", (64, 2048, 7, 7)),
    ):
        weight, bias = torch.randn(100, size[1]), torch.randn(100)
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(size).to(memory_format=layout)
            shape = f"{layer} {str(layout).removeprefix('torch.').removesuffix('_format')}"
            with torch.inference_mode():
                faster(rows, "functional.exit_head", "reference", shape,
                       lambda x=x, w=weight, b=bias: functional.exit_head(x, w, b, 0.9),
                       lambda x=x, w=weight, b=bias: reference.exit_head(x, w, b, 0.9),
                       None)  # fmt: skip


def loss_rows(rows: list[Row]) -> None:
    for N, C in ((16, 10), (64, 100), (256, 1000)):
        x = (torch.randn(N, C) * 3).requires_grad_()
        y = torch.randint(0, C, (N,))

        def step(f: Callable[..., Any], x=x, y=y):
            x.grad = None
            f(x, y, threshold=0.9).loss.sum().backward()

        faster(rows, "exit_loss, forward + backward", "reference", f"[{N}, {C}]",
               lambda s=step: s(functional.exit_loss), lambda s=step: s(reference.exit_loss),
               None)  # fmt: skip


def environment() -> dict[str, str]:
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    cpu = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(
            (part.strip() for part in line.split(":", 1))
            for line in cpuinfo.read_text().splitlines()
            if ":" in line
        )
        cpu = f"{fields.get('model name', cpu)}, family {fields.get('cpu family', '?')}"
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "cpu": cpu,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="also write the rows as JSON")
    output = parser.parse_args().output
    rows: list[Row] = []
    gate_rows(rows)
    compact_rows(rows)
    head_rows(rows)
    loss_rows(rows)
    missed = [row for row in rows if row.holds is False]
    print(f"\n{sum(row.holds is True for row in rows)} figures hold, {len(missed)} missed")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        report = {"environment": environment(), "rows": [asdict(row) for row in rows]}
        output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
