"""Images per second, refused for wrong results."""

from __future__ import annotations

import pytest
import torch

from elf_fast.base import ELFOutput
from elf_fast.bench.inference import check_agreement
from elf_fast.demo import network, throughput


def _output(exit_index, prediction, confidence):
    n = len(exit_index)
    return ELFOutput(
        torch.zeros(n, 2), torch.tensor(prediction), torch.tensor(confidence),
        torch.tensor(exit_index), None,
    )  # fmt: skip


def test_speed_is_refused_for_results_that_differ_but_not_for_ties():
    thresholds = torch.tensor([0.5])
    ours = _output([0, 1], [0, 1], [0.5000001, 0.6])
    check_agreement(ours, ours, thresholds)
    check_agreement(ours, _output([1, 1], [1, 1], [0.9, 0.6]), thresholds)
    with pytest.raises(RuntimeError, match="disagree on 1 of 2"):
        check_agreement(ours, _output([0, 1], [0, 0], [0.5, 0.6]), thresholds)
    with pytest.raises(RuntimeError, match="disagree on 1 of 2"):
        check_agreement(ours, _output([0, 0], [0, 1], [0.5, 0.6]), thresholds)


def test_throughput_of_all_three_is_positive(digits):
    entries = throughput.measure(
        network.with_exits(10, widths=(4, 8, 8)), network.without_exits(10, widths=(4, 8, 8)),
        digits.test.images[:40], batch_sizes=(16, 64), repeats=2,
    )  # fmt: skip
    assert [e["batch_size"] for e in entries] == [16, 40]
    for entry in entries:
        assert {"full", "reference", "elf_fast"} < set(entry["images_per_second"])
        assert set(entry["ratios"]) == {"elf_fast/full", "elf_fast/reference", "elf_fast_off/full"}
        assert all(q[0] > 0 for q in entry["images_per_second"].values())
