"""The demo's networks."""

from __future__ import annotations

import torch

from elf_fast.flops import count_flops
from elf_fast.runs import demo_network as network


def test_the_twin_without_exits_costs_what_the_shares_are_taken_of():
    image = torch.zeros(1, 1, 16, 16)
    with_exits = count_flops(network.with_exits(10), image)
    without = count_flops(network.without_exits(10), image)
    assert with_exits.without_exits == without.leaving_at(0)
