"""`make gpu-check`: its outcome for parts that fail, hang or cannot run, and the package that the
parts import."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import check


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr(check, "GRACE", 0.5)


def part(name: str, code: str, reserved: float = 5.0) -> check.Part:
    return check.Part(name, [sys.executable, "-c", code], reserved)


def outcomes(out: Path) -> dict[str, str]:
    return {p["part"]: p["outcome"] for p in json.loads((out / "check.json").read_text())["parts"]}


def test_parts_after_a_failing_one_still_run(tmp_path, capsys):
    parts = [
        part("one", "print('FAILED x.py::y - wrong'); print('3 failed'); raise SystemExit(3)"),
        part("two", f"print('no such tool'); raise SystemExit({check.SKIPPED})"),
        part("three", "print('7 targets hold')"),
    ]
    assert check.check(parts, tmp_path, {"gpu": "none"}) == 1
    assert outcomes(tmp_path) == {"one": "failed", "two": "skipped", "three": "ok"}
    said = capsys.readouterr().out
    table = said[said.index("key numbers") :].split("\n")
    assert [line.split()[:2] for line in table[1:4]] == [
        ["one", "failed"], ["two", "skipped"], ["three", "ok"],
    ]  # fmt: skip
    assert "3 failed" in table[1] and "7 targets hold" in table[3]
    assert "  FAILED x.py::y - wrong" in said
    log = (tmp_path / "log.txt").read_text()
    assert set(said.split("\n")) <= set(log.split("\n"))
    assert "no such tool" in log.split("\n")


def test_nothing_failed(tmp_path):
    parts = [part("one", "print(1)"), part("two", f"raise SystemExit({check.SKIPPED})")]
    assert check.check(parts, tmp_path, {}) == 0


def test_a_part_out_of_time_is_killed_with_its_children(tmp_path):
    """The part and its child ignore the request to end; what they printed stays."""
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}]);"
        "print('child', child.pid, flush=True); time.sleep(60)"
    )
    start = time.monotonic()
    parts = [part("slow", code), part("after", "print('went on')", reserved=2.0)]
    assert check.check(parts, tmp_path, {}, total=3.0) == 1
    assert time.monotonic() - start < 10
    assert outcomes(tmp_path) == {"slow": "out of time", "after": "ok"}
    log = (tmp_path / "log.txt").read_text()
    pid = int(next(line for line in log.split("\n") if line.startswith("child ")).split()[1])
    for _ in range(50):  # its new parent may take a moment to reap it
        if not os.path.exists(f"/proc/{pid}") or "Z" in Path(f"/proc/{pid}/stat").read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"process {pid} is still there")


def test_time_that_a_part_leaves_goes_to_later_ones(tmp_path, capsys):
    parts = [part("first", "pass", reserved=30.0), part("last", "pass", reserved=10.0)]
    assert check.check(parts, tmp_path, {}, total=50.0) == 0
    limits = [int(n) for n in re.findall(r"at most (\d+) s", capsys.readouterr().out)]
    assert limits[0] == 40 and 40 < limits[1] <= 50


def test_parts_stay_under_nine_minutes_and_know_the_architecture(tmp_path):
    parts = check.parts_of(tmp_path, "9.0")
    assert list(parts) == list(check.RESERVED)
    assert sum(p.reserved for p in parts.values()) <= check.TOTAL
    assert check.TOTAL + len(parts) * check.GRACE < 540
    assert parts["build"].env["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert "ELF_FAST_BUILD=cuda" in parts["build"].command[-1]
    for name in check.TESTS:
        assert (Path(__file__).parents[1] / name).exists()


@pytest.mark.parametrize(
    "name, safe_path", [("sanitizer", ""), ("benchmarks", ""), ("benchmarks", "1")]
)
def test_parts_import_the_installed_package(tmp_path, monkeypatch, name, safe_path):
    """The part runs the benchmarks of this tree. The installed elf_fast is a stand-in that prints
    where it lies and ends the process with the status for "skipped"."""
    installed = tmp_path / "library" / "elf_fast" / "__init__.py"
    installed.parent.mkdir(parents=True)
    installed.write_text(f"print(__file__)\nraise SystemExit({check.SKIPPED})\n")
    monkeypatch.setattr(check, "LIBRARY", tmp_path / "library")
    monkeypatch.setenv("PYTHONPATH", str(check.ROOT))
    monkeypatch.setenv("PYTHONSAFEPATH", safe_path)  # "1": the current folder is not on the path
    result = check.run_part(check.parts_of(tmp_path, None)[name], 60.0, tmp_path / "log.txt")
    assert (result.outcome, result.key_numbers) == ("skipped", str(installed))
