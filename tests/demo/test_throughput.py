"""Images per second of the demo's networks."""

from __future__ import annotations

from elf_fast.demo import throughput
from elf_fast.runs import demo_network as network


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
