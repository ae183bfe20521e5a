"""The demo from end to end."""

from __future__ import annotations

import json

from run_cases import refused


def test_demo_writes_its_files_and_prints_the_table(demo_output):
    folder, printed = demo_output
    assert {p.name for p in folder.iterdir()} == {
        "report.html", "results.json", "accuracy_flops.png", "model.safetensors", "config.json"
    }  # fmt: skip
    for text in ("test accuracy", "few (", "FLOPs per image", "elf_fast", "reference", "seed 0"):
        assert text in printed
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= 3
    assert "http://" not in page and "https://" not in page  # everything is inside
    assert (folder / "accuracy_flops.png").read_bytes().startswith(b"\x89PNG")


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
