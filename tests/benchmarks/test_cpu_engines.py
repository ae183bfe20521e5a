"""The benchmark of engines on a small network."""

from __future__ import annotations

import json

import torch

from benchmarks.cpu import engines
from benchmarks.inputs import Network, build
from benchmarks.row import Row
from elf_fast import inference
from elf_fast.timing import Quartiles

SMALL = Network("cifar_resnet8", 16, 10)


def test_rows_have_their_targets(monkeypatch):
    monkeypatch.setattr(engines, "SINGLES", 3)
    model, x = build(SMALL, 2)
    engine = inference.compile(model.eval(), x, engine="eager")
    ran = []
    whole = {"eager": lambda x: ran.append(("eager", len(x))), "inductor": lambda x: None}
    subject = engines.Subject(SMALL, model, dict.fromkeys(engines.ENGINES, engine), whole)
    for N, share in ((1, 0.5), (4, 0.5), (4, 1.0)):
        rows = list(engines.rows(subject, N, share, seconds=0.0))
        assert all(row.suite == "engines" and row.needs["subject"].median > 0 for row in rows)
        targets = {(row.subject, row.baseline): row.least for row in rows if row.least}
        assert targets[("eager", "oracle, eager")] == (0.92 if N == 1 else 0.97)
        assert (("inductor", "whole, inductor") in targets) is (share == 1.0)
        fastest = [row for row in rows if row.subject == "auto" and row.baseline[:5] == "whole"]
        fastest = [row for row in fastest if row.least]
        assert len(fastest) == (N == 1)
    assert {n for _, n in ran} == {1, 4}


def test_the_oracle_runs_the_batches_that_reach_each_stage():
    model, x = build(SMALL, 6)
    engine = inference.compile(model.eval(), x, engine="eager")
    work = engines.inference_work(model, x, 0.5)
    seen = []
    code = engine.stage_code
    engine.stage_code = lambda e, n: lambda batch: seen.append((e, n)) or code(e, n)(batch)
    engines._oracle(engine, work, 6)()
    assert seen == [(0, 6), (1, 3), (2, 2)]
    seen.clear()
    engines._oracle(engine, work, 1)()
    exits = work.exit_index.tolist()
    assert seen == [(e, 1) for last in exits for e in range(last + 1)]
    assert sorted(seen) == [(0, 1)] * 6 + [(1, 1)] * 3 + [(2, 1)] * 2


def test_onnx_runtime_and_openvino_compute_the_network():
    model, x = build(SMALL, 2)
    net = torch.nn.Sequential(*model.eval().stages, model.heads[-1])
    for name, run in engines._others(net, x).items():
        for n in (1, 3):
            images = x[:1].expand(n, -1, -1, -1)
            with torch.no_grad():
                torch.testing.assert_close(run(images), net(images), rtol=1e-3, atol=1e-4, msg=name)


def test_a_file_keeps_the_shapes_that_are_not_measured_again(tmp_path):
    def row(shape: str, ratio: float) -> Row:
        q = Quartiles(ratio, ratio, ratio)
        return Row("engines", "a", "b", shape, q, None, {"subject": q, "baseline": q})

    path = tmp_path / "new" / "found.json"
    engines._write(path, [row("x", 1.0), row("y", 1.0)], {"environment": 1})
    engines._write(path, [row("x", 2.0)], {"environment": 2})
    runs = json.loads(path.read_text())["runs"]
    found = [(run["environment"], r["shape"], r["ratio"][0]) for run in runs for r in run["rows"]]
    assert found == [(1, "y", 1.0), (2, "x", 2.0)]
    engines._write(path, [row("y", 3.0)], {"environment": 3})
    assert [run["environment"] for run in json.loads(path.read_text())["runs"]] == [2, 3]
