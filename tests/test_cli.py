"""The command line: one small demo from end to end, and what its errors look like."""

import json
import subprocess
import sys

import pytest
import torch

import elf_fast
from elf_fast import cli

for extra in ("sklearn", "safetensors", "rich", "matplotlib", "torchmetrics"):
    pytest.importorskip(extra)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(folder, printed text) of a demo with one seed and one epoch."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("demo") / "out"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.main(["demo", "--output", str(folder), "--seeds", "1", "--epochs", "2"]) == 0
    return folder, printed.getvalue()


def test_demo_writes_its_files_and_prints_the_table(demo):
    folder, printed = demo
    assert {p.name for p in folder.iterdir()} == {
        "report.html", "results.json", "accuracy_flops.png", "model.safetensors"
    }  # fmt: skip
    for text in ("test accuracy", "few (", "FLOPs per image", "elf_fast", "reference", "seed 0"):
        assert text in printed
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= 3
    assert "http://" not in page and "https://" not in page  # everything is inside
    assert (folder / "accuracy_flops.png").read_bytes().startswith(b"\x89PNG")


def test_demo_results_are_complete(demo):
    results = json.loads((demo[0] / "results.json").read_text())
    (run,) = results["runs"]
    assert set(run["test"]) == {"without_exits", "never", "elf"}
    assert run["test"]["never"]["exit_shares"] == [0, 0, 1]
    assert run["test"]["without_exits"]["flops_share"] == 1
    assert run["validation"]["chosen"] >= run["validation"]["exits_off"]
    assert run["curve"][-1]["threshold"] is None
    assert run["curve"][-1]["accuracy"] == run["test"]["never"]["overall"]
    assert [e["batch_size"] for e in results["throughput"]] == [256, 16]


def test_eval_repeats_the_demos_numbers(demo, capsys):
    folder, _ = demo
    threads = torch.get_num_threads()
    assert cli.main(["eval", str(folder / "model.safetensors"), "--json"]) == 0
    results = json.loads((folder / "results.json").read_text())
    assert json.loads(capsys.readouterr().out) == results["runs"][0]["test"]["elf"]
    assert torch.get_num_threads() == threads
    assert cli.main(["eval", str(folder)]) == 0
    overall = 100 * results["runs"][0]["test"]["elf"]["overall"]
    assert f"accuracy overall, %       {overall:.1f}" in capsys.readouterr().out


def _error(capsys, *arguments):
    """What a failing command says: one line on stderr, exit status 2."""
    assert cli.main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("elf-fast: ")
    assert "Traceback" not in captured.err
    return captured.err


def test_eval_refuses_bad_files_in_one_line(demo, tmp_path, capsys):
    assert "found none" in _error(capsys, "eval", tmp_path / "missing.safetensors")
    assert "found none" in _error(capsys, "eval", tmp_path)
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes((demo[0] / "model.safetensors").read_bytes()[:1000])
    assert "cut short" in _error(capsys, "eval", bad)


def test_eval_refuses_a_checkpoint_of_another_network(demo, tmp_path, capsys):
    from elf_fast.training import checkpoint

    state, metadata = checkpoint.load(demo[0] / "model.safetensors")
    path = tmp_path / "other.safetensors"
    checkpoint.save(path, state, {**metadata, "network": "resnet"})
    assert "got network 'resnet'" in _error(capsys, "eval", path)
    checkpoint.save(path, {k: v for k, v in state.items() if k != "temperatures"}, metadata)
    assert "weights do not fit" in _error(capsys, "eval", path)
    checkpoint.save(path, state, {**metadata, "imbalance": 20.0})
    assert "expected class_counts" in _error(capsys, "eval", path)


def test_demo_refuses_a_file_as_its_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "expected a folder" in _error(capsys, "demo", "--output", tmp_path / "file")
    assert "file" in _error(capsys, "demo", "--output", tmp_path / "file" / "inside")


@pytest.mark.parametrize(
    "arguments", [["demo", "--seeds", "0"], ["demo", "--epochs", "x"], [], ["no"]]
)
def test_bad_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_a_missing_extra_is_named_with_its_cure(monkeypatch, tmp_path, capsys):
    for name in [m for m in sys.modules if m.startswith("elf_fast.training.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    for name in [m for m in sys.modules if m.startswith("rich.")]:
        monkeypatch.delitem(sys.modules, name)
    message = _error(capsys, "demo", "--output", tmp_path)
    assert 'rich is not installed: pip install "elf_fast[train]"' in message


def test_a_reader_that_stops_early_is_no_error():
    code = "import sys, elf_fast.cli; sys.exit(elf_fast.cli.main(['doctor']))"
    command = [sys.executable, "-u", "-c", code]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    running.stdout.close()
    assert (running.stderr.read(), running.wait()) == (b"", 0)
    running.stderr.close()


def test_doctor_says_what_serves_each_device(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert elf_fast.__version__ in printed and torch.__version__ in printed
    assert all(line in printed for line in elf_fast.report().values())


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
