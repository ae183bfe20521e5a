"""The command line: help, bad arguments, missing packages."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from run_cases import refused

from elf_fast import cli
from elf_fast.cli import doctor


@pytest.mark.parametrize(
    "arguments", [["demo", "--seeds", "0"], ["demo", "--epochs", "x"], [], ["no"]]
)
def test_bad_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_a_missing_extra_is_named_with_its_cure(monkeypatch, tmp_path, capsys):
    for name in [m for m in sys.modules if m.startswith("elf_fast.demo.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    for name in [m for m in sys.modules if m.startswith("rich.")]:
        monkeypatch.delitem(sys.modules, name)
    message = refused(capsys, "demo", "--output", tmp_path)
    assert 'rich is not installed: pip install "elf_fast[train]"' in message


def test_a_reader_that_stops_early_is_no_error():
    code = "import sys, elf_fast.cli; sys.exit(elf_fast.cli.main(['doctor']))"
    command = [sys.executable, "-u", "-c", code]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    running.stdout.close()
    assert (running.stderr.read(), running.wait()) == (b"", 0)
    running.stderr.close()


def test_what_the_encoding_of_stdout_lacks_is_spelled_out(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(doctor, "run", lambda arguments: print("\xe9t\xe9", flush=True))
    cli.main(["doctor"])
    assert stdout.buffer.getvalue() == b"\\xe9t\\xe9\n"


def test_a_worker_that_torch_misses_is_one_line(monkeypatch, capsys):
    """torch raises this wherever the main thread is."""

    def run(arguments):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(doctor, "run", run)
    assert cli.main(["doctor"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("elf-fast: workers: expected ") and said.count("\n") == 1


def test_help_imports_none_of_the_heavy_libraries():
    code = (
        "import sys, elf_fast.cli\n"
        "try: elf_fast.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'sklearn', 'matplotlib', 'rich', 'safetensors', 'torchmetrics'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout and "eval" in done.stdout and "doctor" in done.stdout
