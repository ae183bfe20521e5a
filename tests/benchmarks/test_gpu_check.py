"""The runner of `make gpu-check`: what it says of parts that fail, hang or cannot run."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import conftest
import pytest
import torch

from benchmarks.gpu import check as gpu_check
from benchmarks.gpu import targets as gpu


@pytest.fixture(autouse=True)
def little_grace(monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 0.5)


def part(name: str, code: str, kept: float = 5.0) -> gpu_check.Part:
    return gpu_check.Part(name, [sys.executable, "-c", code], kept)


def outcomes(out: Path) -> dict[str, str]:
    return {p["part"]: p["outcome"] for p in json.loads((out / "check.json").read_text())["parts"]}


def test_a_failing_part_is_reported_and_stops_no_other(tmp_path, capsys):
    parts = [
        part("one", "print('FAILED x.py::y - wrong'); print('3 failed'); raise SystemExit(3)"),
        part("two", f"print('no such tool'); raise SystemExit({gpu_check.SKIPPED})"),
        part("three", "print('7 figures hold')"),
    ]
    assert gpu_check.check(parts, tmp_path, {"gpu": "none"}) == 1
    assert outcomes(tmp_path) == {"one": "failed", "two": "skipped", "three": "ok"}
    said = capsys.readouterr().out
    table = said[said.index("key numbers") :].split("\n")
    assert [line.split()[:2] for line in table[1:4]] == [
        ["one", "failed"], ["two", "skipped"], ["three", "ok"],
    ]  # fmt: skip
    assert "3 failed" in table[1] and "7 figures hold" in table[3]
    assert "  FAILED x.py::y - wrong" in said
    log = (tmp_path / "log.txt").read_text()
    assert set(said.split("\n")) <= set(log.split("\n"))
    assert "no such tool" in log.split("\n")


def test_nothing_failed(tmp_path):
    parts = [part("one", "print(1)"), part("two", f"raise SystemExit({gpu_check.SKIPPED})")]
    assert gpu_check.check(parts, tmp_path, {}) == 0


def test_a_part_out_of_time_is_killed_with_its_children(tmp_path):
    """The part and its child ignore the request to end; what they printed stays."""
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}]);"
        "print('child', child.pid, flush=True); time.sleep(60)"
    )
    start = time.monotonic()
    parts = [part("slow", code), part("after", "print('went on')", kept=2.0)]
    assert gpu_check.check(parts, tmp_path, {}, total=3.0) == 1
    assert time.monotonic() - start < 10
    assert outcomes(tmp_path) == {"slow": "out of time", "after": "ok"}
    log = (tmp_path / "log.txt").read_text()
    pid = int(next(line for line in log.split("\n") if line.startswith("child ")).split()[1])
    for _ in range(50):  # whoever adopts it may take a moment to bury it
        if not os.path.exists(f"/proc/{pid}") or "Z" in Path(f"/proc/{pid}/stat").read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"process {pid} is still there")


def test_time_that_a_part_leaves_goes_to_later_ones(tmp_path, capsys):
    parts = [part("first", "pass", kept=30.0), part("last", "pass", kept=10.0)]
    assert gpu_check.check(parts, tmp_path, {}, total=50.0) == 0
    limits = [int(n) for n in re.findall(r"at most (\d+) s", capsys.readouterr().out)]
    assert limits[0] == 40 and 40 < limits[1] <= 50


def test_parts_stay_under_nine_minutes_and_know_the_architecture(tmp_path):
    parts = gpu_check.parts_of(tmp_path, "9.0")
    assert list(parts) == list(gpu_check.KEPT)
    assert sum(p.kept for p in parts.values()) <= gpu_check.TOTAL
    assert gpu_check.TOTAL + len(parts) * gpu_check.GRACE < 540
    assert parts["build"].env["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert "ELF_FAST_BUILD=cuda" in parts["build"].command[-1]
    for name in gpu_check.TESTS:
        assert (Path(__file__).parents[1] / name).exists()


def test_a_run_ends_where_the_device_is_lost(monkeypatch):
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with monkeypatch.context() as broken:
        broken.setattr(torch.cuda, "synchronize", lost)
        with pytest.raises(pytest.exit.Exception, match="the CUDA device is lost: CUDA error"):
            conftest.pytest_runtest_logfinish()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    conftest.pytest_runtest_logfinish()


def test_a_candidate_that_loses_the_device_takes_no_other_with_it(tmp_path, monkeypatch):
    """The next process measures the shape without it."""
    pytest.importorskip("triton")
    from benchmarks.gpu import jobs as gpu_jobs
    from benchmarks.gpu import timing as gpu_timing

    output = tmp_path / "kernels.json"

    class Fragile(gpu_timing.DryRun):
        def measure(self, candidates, sets, size):
            for candidate in candidates:
                if candidate.name == "plain":
                    return {}, {candidate.key: "RuntimeError: lost"}
            return super().measure(candidates, sets, size)

    def worker(*_, **__):
        """In this process, one worker after the other."""
        status = gpu.work(output, options)
        return types.SimpleNamespace(wait=lambda timeout=None: status)

    options = argparse.Namespace(budget=60.0, dry_run=True, quick=True)
    monkeypatch.setattr(gpu_timing, "DryRun", Fragile)
    jobs = gpu_jobs.jobs
    monkeypatch.setattr(gpu_jobs, "jobs", lambda bench: itertools.islice(jobs(bench), 1))
    monkeypatch.setattr(
        gpu, "subprocess", types.SimpleNamespace(**vars(subprocess) | {"Popen": worker})
    )
    report = gpu.supervise(output, options)
    errors = {row["candidate"]: row["error"] for row in report["rows"]}
    assert errors.pop("plain") == "RuntimeError: lost"
    assert {"triton", "eager"} <= set(errors) and set(errors.values()) == {None}
