"""The recipe that fine-tunes pretrained weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from run_cases import parsed

from benchmarks.accuracy import finetune, lite0, results

ROOT = Path(__file__).resolve().parents[2]


def record(overall: float, shares: list[float]) -> dict:
    test = {"overall": overall, "many": 0.75, "medium": 0.5, "flops_share": 0.8}
    return {"test": {**test, "exit_shares": shares}}


def test_the_table_has_means_and_deviations_over_the_seeds():
    runs = finetune.table()
    records = {
        run: record(0.5 + run.seed / 100, [0.25, 0.75] if run.variant == "keep" else [1.0])
        for run in runs
    }
    assert len(records) == 6
    lines = finetune.summary(records).splitlines()[2:]
    assert lines == [
        "| without exits | 3 | 51.0 ± 1.0% | 75.0 ± 0.0% | 50.0 ± 0.0% | 80.0 ± 0.0% | 100% |",
        "| with exits | 3 | 51.0 ± 1.0% | 75.0 ± 0.0% | 50.0 ± 0.0% | 80.0 ± 0.0% | 25% / 75% |",
    ]


def test_the_page_has_the_table_of_the_results():
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert finetune.summary(results.load(finetune.PATH)) in page


@pytest.mark.parametrize("variant", finetune.VARIANTS)
def test_its_flags_are_settings(variant):
    pytest.importorskip("yaml")
    config = parsed(*finetune.SETTINGS, *finetune.VARIANTS[variant], "--data-dir", "a")
    assert config.model == lite0.MODEL and config.has_exits == (variant == "keep")


def test_weights_of_another_network_are_refused():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="weights: expected those of timm/tf_efficientnet_lite0"):
        lite0.renamed({"a": torch.zeros(2)})
