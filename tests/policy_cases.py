"""A table of exits that several tests choose thresholds on."""

from __future__ import annotations

import torch

from elf_fast.policy import ExitTable

FLOPS = [0.4, 0.7, 1.05]
GROUPS = {"many": [0, 1, 2], "medium": [3, 4, 5], "few": [6, 7, 8, 9]}


def made(N: int = 600, C: int = 10, E: int = 3, seed: int = 0) -> ExitTable:
    """Later exits are better, some samples are hard, and exits are sure to different degrees."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, C, (N,), generator=generator)
    easy = 1.2 - torch.rand(N, generator=generator)
    z = torch.randn(E, N, C, generator=generator)
    for e in range(E):
        z[e, torch.arange(N), target] += 3 * easy * (1 + e)
        z[e] *= (0.5, 2.0, 1.0, 1.0)[e]
    return ExitTable.from_logits(z, target)
