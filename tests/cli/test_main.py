"""The command line: help, bad arguments, missing packages."""

from __future__ import annotations

import importlib
import io
import subprocess
import sys

import pytest
from run_cases import refused

import elf_fast
from elf_fast import cli
from elf_fast.cli import doctor
from elf_fast.cli.errors import with_flags


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
    main = importlib.import_module("elf_fast.cli.main")  # `cli.main` is the function
    monkeypatch.setattr(main, "_EXTRA", {"rich": "rich", "torch": "torch"})
    message = refused(capsys, "demo", "--output", tmp_path)
    cure = 'pip install rich (or pip install ".[train]" in the source folder)'
    assert message == f"elf-fast: rich is not installed: {cure}\n"
    monkeypatch.setattr(main, "_EXTRA", {"rich": "rich", "no_such": "none-such"})
    assert "pip install rich none-such (or" in refused(capsys, "demo", "--output", tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "--epoch", "3"], "--epoch: expected a flag of elf-fast train, got none; near "
         "flags: --epochs,"),
        (["bench", "--batc=3"], "--batc: expected a flag of elf-fast bench, got none; near flags: "
         "--batch\n"),
        (["eval", "a", "--xyz"], "--xyz: expected a flag of elf-fast eval, got none; elf-fast eval "
         "--help lists them\n"),
        (["eval", "a", "b", "c"], "expected no more arguments, got b c\n"),
        (["demo", "--seeds", "0"], "--seeds: expected a positive integer, got '0'\n"),
        (["train", "--drop-exited", "x"], "--drop-exited/--keep-exited: expected none or nothing"),
    ],
)  # fmt: skip
def test_a_wrong_flag_is_one_line_and_flags_have_their_whole_names(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith(f"elf-fast: {message}")
    assert said.count("\n") == 1


def test_an_error_of_the_system_without_a_text_is_not_empty(monkeypatch, capsys):
    def run(arguments):
        raise FileNotFoundError

    monkeypatch.setattr(doctor, "run", run)
    assert refused(capsys, "doctor") == "elf-fast: FileNotFoundError\n"


def test_the_package_runs_as_a_module_and_has_a_version():
    command = [sys.executable, "-m", "elf_fast", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"elf_fast {elf_fast.__version__}\n")


def test_settings_at_the_start_of_lines_become_flags():
    message = "data_dir: expected a folder, got data_dir: x\nother: data_dir\nlists: none"
    assert with_flags(message, {"data_dir", "lists"}) == (
        "--data-dir: expected a folder, got data_dir: x\nother: data_dir\n--lists: none"
    )


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
