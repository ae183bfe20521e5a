"""The servers that the scheduler is compared with answer every request in order."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cpu import serving
from elf_fast import ELFOutput


class Engine:
    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, x):
        self.sizes.append(len(x))
        return ELFOutput(2 * x, x[:, 0].long(), x[:, 0], x[:, 0].long(), None)


@pytest.mark.parametrize("kind", [serving.OneAtATime, serving.DynamicBatcher])
def test_every_request_gets_its_answer(kind, monkeypatch):
    monkeypatch.setattr(serving, "MAX_WAIT_MS", 1.0)
    engine = Engine()
    images = list(torch.arange(400.0)[:, None].split([5, 16, 1, 3] * 16))
    server = kind(engine)
    found = serving.serve(server, serving.Requests(images, [0.0] * len(images)))
    assert sum(engine.sizes) == 400 and len(found.latency_us) == 64 and found.by_exit_us == []
    assert found.p99 <= max(found.latency_us) == pytest.approx(400 * found.us_per_image)
    most = serving.MAX_BATCH if kind is serving.DynamicBatcher else 16
    assert max(engine.sizes) <= most and len(engine.sizes) >= 400 / most
    server = kind(engine)
    futures = [server.submit(x) for x in images]
    for x, future in zip(images, futures, strict=True):
        assert torch.equal(future.result(5)[0], 2 * x)
    server.shutdown()


def test_latency_counts_from_when_a_request_was_due():
    class Late:
        def submit(self, x):
            future = serving.Future()
            future.set_result(None)
            return future

        def shutdown(self):
            pass

    requests = serving.Requests([torch.zeros(1, 1)] * 2, [-0.5, 0.01])
    early, on_time = serving.serve(Late(), requests).latency_us
    assert early > 0.5e6 and 0 <= on_time < 0.2e6
