"""The table and the sentences made from results."""

from __future__ import annotations

import json

import pytest

from elf_fast.demo import summary


def _results(ours, theirs, ratio=(1.5, 2.0, 2.5)):
    def test(overall, shares, flops_share):
        return {"overall": overall, "many": None, "medium": 0.9, "few": overall,
                "exit_shares": shares, "exit_shares_by_class": [shares, shares],
                "flops_share": flops_share}  # fmt: skip

    rates = {"full": 100, "reference": 150, "elf_fast": 200, "reference_off": 90,
             "elf_fast_off": 95}  # fmt: skip
    ratios = {"elf_fast/full": ratio, "elf_fast/reference": [0.9, 1.0, 1.1],
              "elf_fast_off/full": [0.94, 0.95, 0.96]}  # fmt: skip
    return {
        "class_counts": [50, 2],
        "settings": {"loss_name": "cross-entropy", "drop_exited": False},
        "split": {"train": 52, "validation": 4, "test": 8},
        "throughput": [
            {
                "batch_size": 16,
                "images_per_second": {name: [0, rate, 0] for name, rate in rates.items()},
                "ratios": ratios,
            }
        ],
        "runs": [
            {"seed": i, "threshold": 0.5, "seconds": {"without_exits": 1.0, "elf": 2.0},
             "test": {"elf": test(a, [0.5, 0.25, 0.25], 0.4),
                      "never": test(a, [0.0, 0.0, 1.0], 1.04),
                      "without_exits": test(b, [1.0], 1.0)}}
            for i, (a, b) in enumerate(zip(ours, theirs, strict=True))
        ],
    }  # fmt: skip


def test_losing_is_said():
    lines = summary.sentences(_results([0.80, 0.81, 0.79], [0.9, 0.9, 0.9]))
    assert lines[0] == (
        "At 40% of the FLOPs of the network without exits, ELF is less accurate, by "
        "-10.0 [-12.5, -7.5] points of accuracy over 3 seeds."
    )
    assert lines[1] == (
        "It loses accuracy beyond chance in these groups of classes: few (-10.0 [-12.5, -7.5])."
    )


def test_a_gain_is_said_if_it_is_beyond_chance():
    lines = summary.sentences(_results([0.95, 0.90, 0.88], [0.9, 0.92, 0.9]))
    assert "ELF differs from it by +0.3 [" in lines[0] and lines[0].endswith("may be chance.")
    lines = summary.sentences(_results([0.95, 0.96, 0.95], [0.9, 0.9, 0.9]))
    assert "ELF is more accurate, by +5.3 [" in lines[0]
    assert lines[1] == "It loses accuracy beyond chance in no group of classes."


def test_one_seed_is_called_weak_evidence():
    lines = summary.sentences(_results([0.9], [0.8], ratio=(0.6, 0.7, 0.8)))
    assert "by +10.0 points of accuracy; with one seed this is weak evidence" in lines[0]
    assert "16 at a time at 0.70 times the speed of the network without exits (0.95" in lines[1]


@pytest.mark.parametrize("seeds", [1, 3])
def test_there_are_at_most_four_sentences_and_no_capitals(seeds):
    lines = summary.sentences(_results([0.8, 0.81, 0.79][:seeds], [0.9] * seeds))
    assert len(lines) <= 4
    assert all(line.count(". ") == 0 and line.endswith(".") for line in lines)
    words = " ".join(lines).replace("ELF", "").replace("FLOPs", "").split()
    assert not any(word.isupper() and len(word) > 1 for word in words)


def test_the_table_has_an_entry_per_model_and_no_number_for_an_empty_group():
    headings, rows = summary.table(_results([0.8, 0.9], [0.7, 0.8]))
    cells = {label.strip(): values for label, values in rows}
    assert len(headings) == 4 and all(len(values) == 3 for values in cells.values())
    assert cells["test accuracy, %"] == ["75.0 ± 7.1", "85.0 ± 7.1", "85.0 ± 7.1"]
    assert cells["many (0 classes, over 100 images)"] == ["none"] * 3
    assert cells["left at exit 1 / 2 / 3, %"] == ["", "0 / 0 / 100", "50 / 25 / 25"]
    assert cells["ELF, elf_fast"] == ["", "95", "200"]
    json.dumps(rows)
