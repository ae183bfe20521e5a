"""The command that trains what is missing."""

from __future__ import annotations

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("torchmetrics")

from accuracy_helpers import RUNS, brief_record

from benchmarks.accuracy import results, run, trial
from benchmarks.accuracy.runs import Run


def test_what_is_there_is_not_run_again(tmp_path, monkeypatch, capsys):
    done = []

    def pretend(r):
        done.append(r)
        return brief_record()

    monkeypatch.setattr(trial, "perform", pretend)
    output = tmp_path / "results.jsonl"
    results.add(Run(50, "ce", "conv", "keep", 1), brief_record(), output)
    filters = ["--only", "imbalance=50", "--only", "loss=ce", "--only", "head=conv"]
    filters += ["--only", "variant=plain,keep,drop"]
    run.main([*filters, "--only", "seed=0,1", "--output", str(output)])
    assert [(r.seed, r.variant) for r in done] == [
        (0, "plain"), (0, "keep"), (0, "drop"), (1, "plain"), (1, "drop"),
    ]  # fmt: skip
    run.main([*filters, "--only", "seed=0,1", "--output", str(output)])
    assert len(done) == 5 and len(results.load(output)) == 6
    assert "0 runs are missing" in capsys.readouterr().out
    run.main([*filters, "--only", "seed=2", "--limit-minutes", "0", "--output", str(output)])
    assert len(done) == 5 and "3 runs are missing" in capsys.readouterr().out


def test_jobs_are_processes_and_give_the_same():
    begun = []

    def in_time() -> bool:
        begun.append(len(begun))
        return True

    for jobs in (1, 2):
        begun.clear()
        records = run.finished(RUNS, jobs, in_time, str)
        first = next(records)
        assert len(begun) == jobs
        assert sorted([first, *records]) == [(r, str(r)) for r in sorted(RUNS)]
