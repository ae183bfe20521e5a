"""Engines of `elf_fast.inference.compile` beside whole networks without exits on the engines that a
user would take.

    python -m benchmarks.cpu.engines [--network N ...] [--batch N ...] [--output FILE]

Candidates, by engine (`eager`: PyTorch with folded BatchNorm, channels-last; `inductor`: compiled
ahead of time, frozen; `auto`: the faster of both per stage and batch size):

    ENGINE              the network with exits
    oracle, ENGINE      its stages alone on batches compacted beforehand, on the same code
    whole, ENGINE       the network without exits, on eager, inductor, ONNX Runtime and OpenVINO

`fastest` is the fastest whole network of a batch size. A batch of 1 stands for 16 images, one after
the other. The first run compiles for half an hour; the code is kept in the user's cache folder.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from elf_fast import ELF
from elf_fast.bench.engines import without_exits
from elf_fast.bench.inference import check_agreement
from elf_fast.bench.workload import InferenceWork, inference_work
from elf_fast.inference import Engine
from elf_fast.inference import compile as compiled
from elf_fast.timing import sample

from ..environment import environment, keep_memory
from ..inputs import Network, build
from ..row import HEADING, Row, counts

NETWORKS = (
    Network("cifar_resnet32", 32, 10),
    Network("torchvision/resnet18", 32, 100),
    Network("torchvision/resnet18", 112, 1000),
    Network("torchvision/resnet50", 112, 1000),
    Network("torchvision/mobilenet_v3_small", 224, 1000),
    Network("timm/vit_tiny_patch16_224", 224, 1000),
)
BATCHES = (1, 16, 64, 256)
SHARES = (0.5, 0.8, 1.0)
ENGINES = ("eager", "inductor", "auto")
#: Images of a batch size of 1, which run one after the other.
SINGLES = 16
#: Least exit efficiency, and least speed relative to the whole network on the same engine if nobody
#: leaves: with one image, and with more.
EFFICIENCY = {True: 0.92, False: 0.97}
NOBODY_LEAVES = {True: 0.93, False: 0.97}
#: Least share of the oracle's speed-up over the fastest whole network; with one image, least speed
#: relative to that network.
AGAINST_FASTEST = {True: 0.93, False: 0.95}


class Subject(NamedTuple):
    """A network on all engines."""

    network: Network
    model: ELF
    engines: dict[str, Engine]
    whole: dict[str, Callable[[Tensor], Any]]  # by engine; images [n, ...] -> logits


def subject(network: Network) -> Subject:
    model, x = build(network, 4)
    model.eval()
    engines = {name: compiled(model, x, engine=name) for name in ENGINES}
    return Subject(network, model, engines, whole_networks(model, x))


def whole_networks(model: ELF, x: Tensor) -> dict[str, Callable[[Tensor], Any]]:
    """The network without exits. On our engines it is an ELF with its last exit alone."""
    alone = without_exits(model)
    found: dict[str, Callable[[Tensor], Any]] = {
        "eager": compiled(alone, x, engine="eager"),
        "inductor": compiled(alone, x, engine="inductor"),
    }
    return found | _others(alone.stages[0], x)


def _others(net: nn.Module, x: Tensor) -> dict[str, Callable[[Tensor], Any]]:
    import onnxruntime
    import openvino

    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "net.onnx")
        torch.onnx.export(
            net.eval(), (x.contiguous(),), path, dynamo=True, external_data=False, verbose=False,
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        )  # fmt: skip
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        core = openvino.Core()
        settings = {
            "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }  # fmt: skip
        network = core.compile_model(core.read_model(path), "CPU", settings)
    name = session.get_inputs()[0].name
    request = network.create_infer_request()

    def by_onnxruntime(x: Tensor) -> Any:
        return torch.from_numpy(session.run(None, {name: x.contiguous().numpy()})[0])

    def by_openvino(x: Tensor) -> Any:
        found = request.infer({0: openvino.Tensor(x.contiguous().numpy(), shared_memory=True)})
        return torch.from_numpy(found[0])

    return {"ONNX Runtime": by_onnxruntime, "OpenVINO": by_openvino}


def rows(subject: Subject, N: int, share: float, *, seconds: float) -> Iterator[Row]:
    model, engines = subject.model, subject.engines
    torch.manual_seed(N)
    M = SINGLES if N == 1 else N
    size = subject.network.size
    images = torch.randn(M, 3, size, size)
    work = inference_work(model, images.to(memory_format=torch.channels_last), share)
    model.thresholds.copy_(work.model.thresholds)
    model.temperatures.copy_(work.model.temperatures)
    batches = images.split(N)
    candidates: dict[str, Callable[[], Any]] = {}
    with torch.inference_mode():
        expected = model(images)
    for name, engine in engines.items():
        check_agreement(engine(images), expected, model.thresholds)
        candidates[name] = _each(engine, batches)
        candidates[f"oracle, {name}"] = _oracle(engine, work, N)
    for name, run in subject.whole.items():
        candidates[f"whole, {name}"] = _each(run, batches)
    with torch.inference_mode():
        times = sample(candidates, seconds=seconds, pause=0.003)
    shape = f"{subject.network}, {f'[{N}]' if N > 1 else f'{M} x [1]'}, {share:g} go on"

    def row(of: str, baseline: str, least: float | None) -> Row:
        ratio = times.ratio(baseline, of)
        needs = {"subject": times.time(of), "baseline": times.time(baseline)}
        return Row("engines", of, baseline, shape, ratio, least, needs)

    single = N == 1
    for name in ENGINES:
        yield row(name, f"oracle, {name}", EFFICIENCY[single])
        if share == 1.0 and name != "auto":
            yield row(name, f"whole, {name}", NOBODY_LEAVES[single])
    names = [name for name in times if name.startswith("whole, ")]
    fastest = min(names, key=lambda name: times.time(name).median)
    best = min((f"oracle, {name}" for name in ENGINES), key=lambda n: times.time(n).median)
    if not single:
        yield row("auto", best, AGAINST_FASTEST[single])
    yield row("auto", fastest, AGAINST_FASTEST[single] if single else None)
    for name in names:
        if name != fastest:
            yield row("auto", name, None)


def _each(run: Callable[[Tensor], Any], batches: Sequence[Tensor]) -> Callable[[], None]:
    def all_batches() -> None:
        for x in batches:
            run(x)

    return all_batches


def _oracle(engine: Engine, work: InferenceWork, N: int) -> Callable[[], None]:
    """The engine's code on the batches that reach each stage, without exit tests. Single
    images go through all their stages one after the other, as they do in the engine."""
    calls: list[tuple[Callable[[Tensor], Any], Tensor]] = []
    inputs = [engine.stage_input(e, len(x)).copy_(x) for e, x in enumerate(work.stage_inputs)]
    if N > 1:
        calls = [(engine.stage_code(e, len(x)), x) for e, x in enumerate(inputs) if len(x)]
    else:
        rows = [iter(x.split(1)) for x in inputs]
        for last in work.exit_index.tolist():
            calls += [(engine.stage_code(e, 1), next(rows[e])) for e in range(last + 1)]

    def run() -> None:
        for code, x in calls:
            code(x)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu.engines", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--network", nargs="+", help="parts of names, such as resnet18,")
    parser.add_argument("--batch", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--share", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--seconds", type=float, default=5.0, help="for each shape")
    parser.add_argument(
        "--output", type=Path, help="JSON file for the rows; other shapes stay in it"
    )
    options = parser.parse_args()
    keep_memory()
    before, about = os.getloadavg(), environment()
    measured: list[Row] = []
    print(HEADING)
    for network in NETWORKS:
        if options.network and not any(part in str(network) for part in options.network):
            continue
        of = subject(network)
        for N in options.batch:
            for share in options.share:
                for row in rows(of, N, share, seconds=options.seconds):
                    measured.append(row)
                    print(row.line(), flush=True)
        if options.output is not None:
            load = {"before": before, "after": os.getloadavg()}
            _write(options.output, measured, {"environment": about, "load": load})
    held, missed = counts(measured)
    print(f"\n{held} targets hold, {missed} are missed")


def _write(path: Path, measured: Sequence[Row], run: dict[str, Any]) -> None:
    """Keeps the rows of earlier runs for shapes that were not measured in this one."""
    shapes = {row.shape for row in measured}
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    for earlier in runs:
        earlier["rows"] = [row for row in earlier["rows"] if row["shape"] not in shapes]
    rows = [row.as_json() for row in measured]
    runs = [earlier for earlier in runs if earlier["rows"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"runs": [*runs, {**run, "rows": rows}]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
