"""Does `policy.advise` predict the speed of a real run?

    python -m benchmarks.cpu.advice [--network N ...] [--engine eager] [--output FILE]

For each network, thresholds are set on one stream of images, the exit shares are counted on a
second one, `advise` predicts from them, and an engine then runs a third stream, in batches of which
any number may leave anywhere. The networks are untrained and the images noise; `inference_work`
sets temperatures with which their confidences differ.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elf_fast import ELF, inference
from elf_fast.bench.engines import without_exits
from elf_fast.bench.workload import inference_work
from elf_fast.policy.advise import EXITS, WHOLE, advise

from ..environment import environment, keep_memory
from ..inputs import Network, build

NETWORKS = (
    Network("cifar_resnet32", 32, 10),
    Network("torchvision/resnet18", 32, 100),
    Network("torchvision/resnet18", 112, 1000),
    Network("torchvision/mobilenet_v3_small", 112, 1000),
    Network("timm/vit_tiny_patch16_224", 224, 1000),
)
BATCHES = (1, 16, 64)
SHARES = (0.6, 0.9)  # of the images that go on after each exit
ROUNDS = 3
#: Of the real run: images of its stream, and seconds of each of the rounds at least.
STREAM, SECONDS = 256, 1.0
WITHIN = 0.10


class Prediction(NamedTuple):
    network: str
    share: float
    batch: int
    candidate: str
    predicted_ms: float  # per batch
    real_ms: float
    verdict: str

    @property
    def error(self) -> float:
        return self.predicted_ms / self.real_ms - 1


def predictions(
    network: Network, engine: str, share: float, *, seconds: float
) -> Iterator[Prediction]:
    model, x = build(network, 64)
    model = inference_work(model, x, share).model
    example = x[:1].contiguous()
    engines = {
        name: inference.compile(whole, example, engine=engine, max_batch=max(BATCHES))
        for name, whole in ((EXITS, model), (WHOLE, without_exits(model)))
    }
    shares = _exit_shares(model, torch.randn(256, *example.shape[1:]))
    found: dict[tuple[int, str], list[tuple[float, float]]] = {}
    verdicts = {}
    for _ in range(ROUNDS):
        advice = advise(model, example, shares, batches=BATCHES, engine=engine, seconds=seconds)
        for row in advice.rows:
            images = torch.randn(STREAM, *example.shape[1:])
            real = _milliseconds(engines[row.network], images, row.batch)
            found.setdefault((row.batch, row.network), []).append((row.ms.median, real))
        verdicts = {verdict.batch: verdict.use for verdict in advice.verdicts}
    for (batch, name), pairs in found.items():
        predicted, real = (median(column) for column in zip(*pairs, strict=True))
        yield Prediction(str(network), share, batch, name, predicted, real, verdicts[batch])


@torch.inference_mode()
def _exit_shares(model: ELF, images: Tensor) -> list[float]:
    exits = torch.cat([model(x).exit_index for x in images.split(64)])
    counts = torch.bincount(exits, minlength=len(model.stages))
    return (counts.double() / len(images)).tolist()


def _milliseconds(engine: inference.Engine, images: Tensor, N: int) -> float:
    """Per batch of N."""
    batches = cycle(images.split(N))
    for x in islice(batches, 2):
        engine(x)
    start, calls = time.perf_counter(), 0
    while (taken := time.perf_counter() - start) < SECONDS or calls * N < STREAM:
        engine(next(batches))
        calls += 1
    return 1e3 * taken / calls


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu.advice", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--network", nargs="+", help="parts of names, such as resnet18,")
    parser.add_argument("--engine", default="eager", choices=inference.compiling.ENGINES)
    parser.add_argument("--seconds", type=float, default=3.0, help="of advise, per batch size")
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    options = parser.parse_args()
    keep_memory()
    before, about = os.getloadavg(), environment()
    rows: list[dict[str, Any]] = []
    print(f"{'network':32} {'go on':>5} {'N':>3} {'':18} {'predicted':>9} {'real, ms':>9} error")
    for network in NETWORKS:
        if options.network and not any(part in str(network) for part in options.network):
            continue
        for share in SHARES:
            for found in predictions(network, options.engine, share, seconds=options.seconds):
                rows.append({**found._asdict(), "error": found.error})
                print(
                    f"{found.network:32} {share:5.0%} {found.batch:3} {found.candidate:18} "
                    f"{found.predicted_ms:9.4g} {found.real_ms:9.4g} {found.error:+5.0%}"
                    f"{'' if abs(found.error) <= WITHIN else '  missed'}",
                    flush=True,
                )
    good = sum(abs(row["error"]) <= WITHIN for row in rows)
    print(f"\n{good} of {len(rows)} predictions within {WITHIN:.0%}")
    if options.output is not None:
        load = {"before": before, "after": os.getloadavg()}
        run = {"environment": about, "load": load, "engine": options.engine, "rows": rows}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(run, indent=1) + "\n")


if __name__ == "__main__":
    main()
