"""docs/accuracy.md: which rows its tables have, with which numbers and verdicts."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("torchmetrics")

from accuracy_helpers import records

from benchmarks.accuracy import cifar, page, results, runs, summary

DIGITS = {
    **records(
        (100, "ce", "conv"), {"plain": 0, "keep": 4, "drop": -2, "stay": 1}, exits_off=2, safe=1
    ),
    **records((50, "ldam_drw", "pooled"), {"plain": 0, "keep": 3.5, "drop": 3.4}, flops=0.6),
    **records((10, "ce", "conv"), {"plain": 0, "keep": 1}, seeds=range(2)),
    **records((100, "ce", "deep"), {"plain": 0, "keep": 5}),
    **records((100, "ce", "conv"), {"plain": 0, "stay": 0.5}, seeds=runs.NEW_SEEDS),
}
CIFAR10 = records((100, "ce", "conv"), {"plain": 0, "keep": 2}, seeds=range(3))
for made in CIFAR10.values():
    (tested, *_) = made["test"].values()
    made["test"] = {point: {**tested, "few": None} for point in ("full", "chosen", "best")}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    """The page that the command writes."""
    folder = tmp_path_factory.mktemp("page")
    command = ["--output", str(folder / "accuracy.md")]
    for option, found in (("--results", DIGITS), ("--cifar10-results", CIFAR10)):
        path = folder / f"{option[2:]}.jsonl"
        for run, record in found.items():
            results.add(run, record, path)
        command += [option, str(path)]
    page.main(command)
    return (folder / "accuracy.md").read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    return re.split(r"\n##+ ", text[text.index(heading) + len(heading) :])[0]


def rows(text: str, heading: str, table: int = 0) -> list[dict[str, str]]:
    """A table under a heading, by its columns. Of two columns with one name the second has a
    star."""
    parts = [p for p in section(text, heading).split("\n\n") if p.startswith("| ")]
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in parts[table].splitlines()]
    columns: list[str] = []
    for name in lines[0]:
        columns.append(f"{name}*" if name in columns else name)
    return [dict(zip(columns, cells, strict=True)) for cells in lines[2:]]


def test_networks_with_exits_against_the_one_without(text):
    found = rows(text, "## ELF against")
    shown = [
        (r["loss"], r["imbalance"], r["head"], r["samples that left"], r["difference"], r["claim"])
        for r in found
    ]
    assert shown == [
        ("cross-entropy", "100", "convolution", "dropped", "-2.0 [-2.1, -1.9]", "fails"),
        ("LDAM-DRW", "50", "pool", "dropped", "+3.4 [+3.3, +3.5]", "holds"),
        ("LDAM-DRW", "50", "pool", "kept", "+3.5 [+3.4, +3.6]", "holds"),
        ("cross-entropy", "100", "convolution", "kept", "+4.0 [+3.9, +4.1]", "holds"),
    ]
    assert {r["seeds"] for r in found} == {"10"}
    assert {r["without exits"] for r in found} == {"69.0%"}
    assert [r["ELF"] for r in found] == ["67.0%", "72.4%", "72.5%", "73.0%"]
    assert [r["FLOPs"] for r in found] == ["70%", "60%", "60%", "70%"]


def test_the_second_table_is_at_the_safe_thresholds(text):
    found = rows(text, "## ELF against", table=1)
    assert [r["difference"] for r in found] == [
        "-1.0 [-1.1, -0.9]", "+3.4 [+3.3, +3.5]", "+3.5 [+3.4, +3.6]", "+5.0 [+4.9, +5.1]",
    ]  # fmt: skip


def test_dropping_against_keeping(text):
    found = rows(text, "## Dropping")
    assert [(r["loss"], r["harm"]) for r in found] == [
        ("cross-entropy", "some"), ("LDAM-DRW", "none"),
    ]  # fmt: skip
    assert [r["best"] for r in found] == ["-6.0 [-6.0, -6.0]", "-0.1 [-0.1, -0.1]"]
    assert [r["best, few-shot"] for r in found] == ["-12.0 [-12.0, -12.0]", "-0.2 [-0.2, -0.2]"]


def test_dropping_with_the_exits_off():
    kept = records((50, "ce", "conv"), {"keep": 4})
    dropped = records((50, "ce", "conv"), {"drop": 1}, exits_off=2)
    (row,) = rows(page.page(kept | dropped, {}), "## Dropping")
    assert (row["best"], row["exits off"]) == ("-3.0 [-3.0, -3.0]", "-1.0 [-1.0, -1.0]")


def test_what_else_was_tried(text):
    deep, stay = rows(text, "## What else")
    assert (deep["samples that left"], deep["head"]) == ("kept", "two-convolution")
    assert (deep["difference"], deep["claim"]) == ("+5.0 [+4.9, +5.1]", "holds")
    assert (deep["against kept"], deep["exits off"]) == ("", "+5.0 [+4.9, +5.1]")
    assert (stay["samples that left"], stay["head"]) == (
        "kept, none leaves in training", "convolution",
    )  # fmt: skip
    assert (stay["difference"], stay["claim"]) == ("+1.0 [+0.9, +1.1]", "fails")
    assert (stay["against kept"], stay["exits off"]) == ("-3.0 [-3.0, -3.0]", "+3.0 [+2.9, +3.1]")


def test_new_seeds_are_a_table_of_their_own(text):
    (new,) = rows(text, "### On new seeds")
    assert (new["seeds"], new["difference"]) == ("20", "+0.5 [+0.5, +0.5]")


def test_all_results_have_every_setting_with_three_seeds(text):
    found = rows(text, "## All results")
    assert [(r["imbalance"], r["head"], r["samples that left"]) for r in found] == [
        ("50", "pool", "without exits"), ("50", "pool", "kept"), ("50", "pool", "dropped"),
        ("100", "convolution", "without exits"), ("100", "convolution", "kept"),
        ("100", "convolution", "dropped"), ("100", "convolution", "kept, none leaves in training"),
        ("100", "two-convolution", "without exits"), ("100", "two-convolution", "kept"),
    ]  # fmt: skip
    assert found[0]["overall"] == "69.0 ± 6.1"
    assert found[0]["left at exit 1 / 2 / 3"] == found[0]["early wrong"] == ""
    assert found[1]["left at exit 1 / 2 / 3"] == "25 / 25 / 50"
    assert (found[1]["early wrong"], found[1]["of few*"]) == ("2.0", "1.0")
    assert (found[1]["ECE"], found[1]["FLOPs"]) == ("10.0", "60.0")


def test_cifar10_has_the_groups_of_classes_and_both_thresholds(text):
    (row,) = rows(text, "## CIFAR-10-LT")
    assert (row["seeds"], row["without exits"], row["ELF"]) == ("3", "62.0%", "64.0%")
    assert row["many"] == row["medium"] == row["difference"] == row["without a limit"]
    assert (row["few"], row["FLOPs"], row["FLOPs*"], row["claim"]) == ("", "70%", "70%", "fails")


def test_finished_runs_are_counted(text):
    assert f" {len(DIGITS)} of the {len(runs.table())} runs " in text.replace("\n", " ")
    assert f" {len(CIFAR10)} of {len(cifar.table())} runs " in text.replace("\n", " ")


def test_the_results_in_short_come_first(text):
    said = section(text, "## In short").strip().splitlines()
    assert said == summary.sentences(summary.summarise(DIGITS))
    assert text.index("## In short") == text.index("\n## ") + 1


def test_a_page_without_results_on_cifar10():
    text = page.page(records((100, "ce", "conv"), {"plain": 0, "keep": 4}), {})
    assert "| " not in section(text, "## CIFAR-10-LT")
    assert f" 0 of {len(cifar.table())} runs " in text.replace("\n", " ")


def test_a_page_of_nothing_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        page.main(["--results", str(tmp_path / "none.jsonl")])
    assert "--results: expected finished runs, found none" in capsys.readouterr().err
