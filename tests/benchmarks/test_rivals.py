"""The rivals give the model's results, and a rival that does not is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import rivals
from elf_fast import ELF, ExitHead
from elf_fast.bench.workload import inference_work

IMAGES = torch.randn(40, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def network() -> ELF:
    torch.manual_seed(0)
    stages = [nn.Conv2d(3 if e == 0 else 8, 8, 3, padding=1) for e in range(3)]
    return ELF(stages, [ExitHead(8, 5) for _ in stages])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("rival", [rivals.tuned_torch, rivals.tuned_torch_graphed, rivals.padded])
def test_rivals_leave_where_the_work_says(network, rival, layout, share):
    work = inference_work(network, IMAGES.to(memory_format=layout), share)
    run = rival(work)
    rivals.check(run, work)
    rivals.check(run, work)  # a second call finds nothing of the first
    with torch.inference_mode():
        prediction, exit_index = run()
        prediction[0] += 1
    with pytest.raises(RuntimeError, match="wrong exits or predictions"):
        rivals.check(lambda: (prediction, exit_index), work)


@pytest.mark.parametrize("name, exits", [("earlyon_single", True), ("earlyon_batched", False)])
def test_earlyon_gives_the_models_results(network, name, exits):
    pytest.importorskip("earlyon")
    work = inference_work(network, IMAGES, 0.5)
    rivals.check(getattr(rivals, name)(work), work, exits=exits)
