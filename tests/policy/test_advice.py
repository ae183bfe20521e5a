"""Advice on networks whose stages say how long they take, on a clock that only they move."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from elf_fast import ELF, timing
from elf_fast.policy import advise as module
from elf_fast.policy.advise import Rival, advise

C = 4
CLOCK = SimpleNamespace(now=0.0)  # seconds


@pytest.fixture(scope="module", autouse=True)
def clock():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: CLOCK.now))
        yield


class Takes(nn.Module):
    """Takes `ms` per call and `each` more per sample. [n, D] -> [n, D or classes]."""

    def __init__(self, ms: float, each: float = 0.0, classes: int | None = None) -> None:
        super().__init__()
        self.ms, self.each = ms, each
        self.layer = nn.Identity() if classes is None else nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        CLOCK.now += (self.ms + self.each * len(x)) / 1e3
        return self.layer(x)


def network(*stages: nn.Module, head: float = 0.0) -> ELF:
    torch.manual_seed(0)
    heads = [Takes(head, classes=C) for _ in stages[:-1]]
    return ELF(stages, [*heads, nn.Linear(8, C)]).eval()


def advised(model: ELF, shares: list[float], **options):
    options = {"batches": (1, 8), "engine": "eager", "seconds": 0.0, **options}
    return advise(model, torch.zeros(1, 8), shares, **options)


@pytest.fixture(scope="module")
def worth_it(clock):
    """The last stage takes nearly all of the time, and a quarter of the samples reach it."""
    slow = network(Takes(0.1), Takes(2.0, each=1.0))
    rivals = {"fast": Rival(Takes(0.2, classes=C)), "slow": Rival(Takes(60.0, classes=C), 1.0)}
    return advised(slow, [0.75, 0.25], accuracy=0.8, rivals=rivals)


def test_advises_the_exits_where_they_save_time(worth_it):
    assert [(v.batch, v.use) for v in worth_it.verdicts] == [(1, "the exits"), (8, "the exits")]
    assert "times as fast as without them" in worth_it.verdicts[0].why


def test_predicts_the_mean_over_the_exits(worth_it):
    ms = {(row.batch, row.network): row.ms.median for row in worth_it.rows}
    assert ms[1, "the exits"] == pytest.approx(0.1 + 0.25 * 3)
    some_go_on = 7 / 8  # of the 8 batches; in the other one nobody reaches the last stage
    assert ms[8, "the exits"] == pytest.approx(0.1 + 2 * some_go_on + 8 * 0.25)
    assert ms[8, "the whole network"] == pytest.approx(0.1 + 2 + 8)
    row = worth_it.rows[-1]
    assert row.images_per_s == pytest.approx(1e3 * row.batch / row.ms.median)


def test_names_a_faster_network_whose_accuracy_is_unknown(worth_it):
    for verdict in worth_it.verdicts:
        assert "so use it if its accuracy reaches 80.0%" in verdict.why
        assert "slow is" not in verdict.why


def test_is_a_text_and_json(worth_it):
    text = str(worth_it)
    assert "75% / 25% of the images leave at each exit" in text
    assert "batches of 8: use the exits; " in text
    found = json.loads(json.dumps(worth_it.to_dict()))
    assert found["verdicts"][1]["use"] == "the exits"
    assert len(found["rows"]) == 2 * 4


@pytest.mark.parametrize(
    ("head", "shares", "why"),
    [
        (20.0, [0.5, 0.5], "the exits need 200% more time"),
        (0.5, [0.0, 1.0], "the exits need 5% more time"),
        (9.7, [1.0, 0.0], "the exits save only 3% of the time"),
    ],
)
def test_advises_the_whole_network_where_exits_cost_more(head, shares, why):
    model = network(Takes(0.0), Takes(10.0), head=head)
    (verdict,) = advised(model, shares, batches=[4]).verdicts
    assert verdict.use == "the whole network"
    assert verdict.why == why


def test_says_what_the_exits_cost_in_accuracy():
    model = network(Takes(0.0), Takes(10.0))
    known = {"accuracy": 0.6, "accuracy_exits_off": 0.7}
    (verdict,) = advised(model, [0.5, 0.5], batches=[2], **known).verdicts
    assert verdict.use == "the exits"
    assert "(60.0% right with exits, 70.0% without)" in verdict.why


def test_advises_a_network_that_is_faster_and_as_accurate():
    model = network(Takes(2.0), Takes(10.0))
    rivals = {
        "quick": Rival(Takes(0.1, classes=C), 0.7),
        "good": Rival(Takes(1.0, classes=C), 0.8),
        "best": Rival(network(Takes(0.5), Takes(0.2), head=50.0), 0.9),  # its heads do not count
    }
    (verdict,) = advised(model, [0.5, 0.5], batches=[2], accuracy=0.8, rivals=rivals).verdicts
    assert verdict.use == "best"
    assert "no less accurate (90.0%, 80.0% with exits)" in verdict.why
    del rivals["best"], rivals["good"]
    (verdict,) = advised(model, [0.5, 0.5], batches=[2], accuracy=0.8, rivals=rivals).verdicts
    assert verdict.use == "the exits"
    assert "quick is faster, but less accurate (70.0%)" in verdict.why


@pytest.mark.parametrize(("N", "batches"), [(1, 64), (5, 13), (64, 2)])
def test_the_stream_follows_the_shares(N, batches):
    by_exit = [torch.arange(0, 40), torch.tensor([], dtype=torch.int64), torch.arange(40, 64)]
    stream = module._stream(by_exit, [0.7, 0.1, 0.2], N, torch.Generator().manual_seed(0))
    assert [len(images) for images in stream] == [N] * batches
    first = torch.cat(stream) < 40
    assert abs(float(first.sum()) - 0.7 / 0.9 * N * batches) <= 0.5
    if N > 1:
        assert len({int((images < 40).sum()) for images in stream}) > 1  # from batch to batch


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"exit_shares": [1.0]}, ValueError, "exit_shares: expected 2, one per exit, got 1"),
        ({"exit_shares": [0.5, 0.4]}, ValueError, "exit_shares: expected a sum of 1, got 0.9"),
        ({"exit_shares": [-0.5, 1.5]}, ValueError, "exit_shares: expected a number in"),
        ({"batches": []}, ValueError, "batches: expected at least one batch size, got none"),
        ({"batches": [0]}, ValueError, "batches: expected an integer in"),
        ({"batches": [4, 4]}, ValueError, r"batches: expected each size once, got \[4, 4\]"),
        ({"accuracy": 80}, ValueError, "accuracy: expected a number in"),
        ({"rivals": {"the exits": Rival(nn.Linear(8, C))}}, ValueError, "rivals: expected other"),
        ({"rivals": {"a": Rival(nn.Linear(8, C), 3.0)}}, ValueError, r"rivals\['a'\].accuracy: "),
        ({"engine": "fast"}, ValueError, "engine: expected"),
        ({"seconds": -1}, ValueError, "seconds: expected a number in"),
        ({"model": nn.Linear(8, C)}, TypeError, "model: expected an ELF, got"),
        ({"example_input": torch.zeros(0, 8)}, ValueError, "example_input: expected a batch"),
    ],
)
def test_refuses(wrong, error, message):
    given = {
        "model": network(nn.Identity(), nn.Identity()), "example_input": torch.zeros(1, 8),
        "exit_shares": [0.5, 0.5], "engine": "eager", "seconds": 0.0, **wrong,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        advise(**given)
