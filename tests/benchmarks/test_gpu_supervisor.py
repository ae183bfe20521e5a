"""The supervisor of the GPU benchmarks: workers that lose the device or crash."""

from __future__ import annotations

import argparse
import itertools
import subprocess
import types

import pytest

pytest.importorskip("triton")
from benchmarks.gpu import results, supervisor, worker
from benchmarks.gpu.timing import DryRun, Measured


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(Bench, jobs): the results of workers in this process, one after the other, that measure
    the first jobs with Bench in the place of DryRun."""
    options = argparse.Namespace(budget=60.0, dry_run=True, quick=True)
    output = tmp_path / "kernels.json"
    all_jobs = worker.jobs

    def start(*_, **__):
        status = worker.work(output, options)
        return types.SimpleNamespace(wait=lambda timeout=None: status)

    def run(bench, jobs: int):
        monkeypatch.setattr(worker, "DryRun", bench)
        monkeypatch.setattr(worker, "jobs", lambda b: itertools.islice(all_jobs(b), jobs))
        stand_in = types.SimpleNamespace(**vars(subprocess) | {"Popen": start})
        monkeypatch.setattr(supervisor, "subprocess", stand_in)
        found = supervisor.run(output, options)
        assert found == results.read(output)
        return found

    return run


def test_the_next_worker_measures_without_a_candidate_that_loses_the_device(run):
    class Fragile(DryRun):
        def measure(self, candidates, sets, size):
            for candidate in candidates:
                if candidate.name == "plain":
                    return Measured(errors={candidate.key: "RuntimeError: lost"})
            return super().measure(candidates, sets, size)

    found = run(Fragile, jobs=1)
    (error,) = found["errors"]
    assert (error["subject"], error["error"]) == ("exit_gate, plain", "RuntimeError: lost")
    compared = {(row["subject"], row["baseline"]) for row in found["rows"]}
    assert ("exit_gate, triton", "eager") in compared
    assert not any("plain" in pair for pair in compared)
    assert found["not run"] == [] and not set(results.PROGRESS) & found.keys()


def test_the_next_worker_goes_on_after_a_shape_that_crashes(run):
    measured = []

    class Crashing(DryRun):
        def measure(self, candidates, sets, size):
            measured.append(candidates[0].op)
            if len(measured) == 1:
                raise RuntimeError("crash")
            return super().measure(candidates, sets, size)

        def alive(self):
            return False

    found = run(Crashing, jobs=2)
    assert [error["error"] for error in found["errors"]] == ["RuntimeError: crash"]
    assert len(measured) == 2 and found["rows"] and found["not run"] == []


def test_a_wrong_candidate_is_an_error_and_is_not_timed(run):
    class Checked(DryRun):
        def measure(self, candidates, sets, size):
            for candidate in candidates:
                if candidate.name == "eager":
                    result = candidate.call(0)
                    result.prediction.add_(1)
                    object.__setattr__(candidate, "call", lambda i, result=result: result)
            return super().measure(candidates, sets, size)

    found = run(Checked, jobs=1)
    (error,) = found["errors"]
    assert error["subject"] == "exit_gate, eager" and error["error"].startswith("wrong: ")
    assert "eager" not in {row["baseline"] for row in found["rows"]}
