"""The demo from end to end."""

from __future__ import annotations

import json

from pages import Page, check_alone_and_accessible
from run_cases import parsed, refused


def test_demo_writes_its_files_and_prints_the_table(demo_output):
    folder, printed = demo_output
    written = {path.name for path in folder.iterdir()}
    assert written == {"report.html", "results.json", "config.json", "model.safetensors"}
    for text in ("test accuracy", "few (", "FLOPs per image", "elf_fast", "reference", "seed 0"):
        assert text in printed


def test_the_report_opens_with_three_figures_and_ends_with_a_command(demo_output):
    folder, _ = demo_output
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    check_alone_and_accessible(page)
    kinds = [tag for tag, _ in page.elements]
    assert kinds.count("dt") == 3
    assert kinds.index("dl") < kinds.index("svg") < kinds.index("table")
    (run,) = json.loads((folder / "results.json").read_text())["runs"]
    assert f"accuracy{100 * run['test']['elf']['overall']:.1f}%95% interval" in page.text
    assert "quartiles" in page.text
    train, evaluate = page.text.replace("\\\n", "").split("elf-fast ")[-2:]
    assert parsed(*train.split()[1:]).conv_heads  # its flags exist
    assert evaluate.startswith("eval runs/photos --report")
    # the other numbers are those of the first seed
    rows = page.table("exit", "FLOPs, % of the whole network")
    assert rows[0][2] == f"{100 * run['test']['elf']['exit_shares'][0]:.1f}"


def test_demo_results_are_complete(demo_output):
    results = json.loads((demo_output[0] / "results.json").read_text())
    (run,) = results["runs"]
    assert set(run["test"]) == {"without_exits", "never", "elf"}
    assert run["test"]["never"]["exit_shares"] == [0, 0, 1]
    assert run["test"]["without_exits"]["flops_share"] == 1
    assert run["validation"]["chosen"] >= run["validation"]["exits_off"]
    assert run["curve"][-1]["threshold"] is None
    assert run["curve"][-1]["accuracy"] == run["test"]["never"]["overall"]
    assert [e["batch_size"] for e in results["throughput"]] == [256, 16]


def test_demo_refuses_a_file_as_its_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "expected a folder" in refused(capsys, "demo", "--output", tmp_path / "file")
    assert "file" in refused(capsys, "demo", "--output", tmp_path / "file" / "inside")
