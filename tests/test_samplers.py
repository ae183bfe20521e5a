"""Samplers: what an epoch holds, how ranks share it, and that a resumed one goes on exactly."""

from __future__ import annotations

import itertools

import pytest
import torch

from elf_fast.samplers import (
    ClassSampler,
    EvaluationSampler,
    InstanceSampler,
    ProgressiveSampler,
    class_probabilities,
)

COUNTS = [400, 90, 0, 9, 2]  # class 2 has no samples
TARGETS = torch.repeat_interleave(torch.arange(5), torch.tensor(COUNTS))[
    torch.randperm(501, generator=torch.Generator().manual_seed(0))
]
N = len(TARGETS)
TRAINING = {
    "instance": InstanceSampler,
    "class-balanced": ClassSampler,
    "square-root": lambda targets, **share: ClassSampler(targets, 0.5, **share),
    "progressive": lambda targets, **share: ProgressiveSampler(targets, 4, **share),
}
EACH = pytest.mark.parametrize("make", TRAINING.values(), ids=TRAINING)


def test_probabilities_follow_the_formula():
    n = torch.tensor([16, 4, 0, 1])
    for q, expected in ((1.0, [16, 4, 0, 1]), (0.5, [4, 2, 0, 1]), (0.0, [1, 1, 0, 1])):
        p = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(class_probabilities(n, q), p / p.sum())


def test_instance_sampling_shows_every_sample_once():
    assert sorted(InstanceSampler(TARGETS)) == list(range(N))


@pytest.mark.parametrize(
    "make, weights",
    [
        (lambda y: ClassSampler(y, 0.0), [1, 1, 0, 1, 1]),
        (lambda y: ClassSampler(y, 0.5), [20, 90**0.5, 0, 3, 2**0.5]),
        (lambda y: ClassSampler(y, 1.0), COUNTS),
        (lambda y: ProgressiveSampler(y, 4), [400 / 501, 90 / 501, 0, 9 / 501, 2 / 501]),
    ],
    ids=["q=0", "q=1/2", "q=1", "progressive, epoch 0"],
)
def test_draws_have_the_classes_shares_and_are_even_within_them(make, weights):
    repeats = 40
    drawn = torch.tensor(list(make(TARGETS.repeat(repeats))))
    seen = torch.bincount(TARGETS.repeat(repeats)[drawn], minlength=5).double()
    p = torch.tensor(weights, dtype=torch.float64)
    p = p / p.sum()
    draws = N * repeats
    assert seen.sum() == draws
    assert bool(((seen - draws * p).abs() <= 5 * (draws * p * (1 - p)).sqrt()).all())
    # A class's draws fall evenly on its samples: here on its first and its second half.
    for c in (0, 1):
        members = (TARGETS.repeat(repeats) == c).nonzero().squeeze(1)
        own = drawn[torch.isin(drawn, members)]
        early = (own < members[len(members) // 2]).double().mean()
        assert abs(early - 0.5) < 5 * 0.5 / len(own) ** 0.5


def test_progressive_sampling_moves_from_instances_to_classes():
    sampler = ProgressiveSampler(TARGETS, 4)
    n = torch.tensor(COUNTS, dtype=torch.float64)
    instance, balanced = n / n.sum(), torch.tensor([1, 1, 0, 1, 1]) / 4
    for epoch, t in ((0, 0.0), (1, 0.25), (3, 0.75), (4, 1.0), (9, 1.0)):
        sampler.set_epoch(epoch)
        expected = (1 - t) * instance + t * balanced
        torch.testing.assert_close(sampler.probabilities(), expected)


@EACH
def test_the_order_depends_on_seed_and_epoch_only(make):
    def order(seed, epoch):
        sampler = make(TARGETS, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    orders = {(seed, epoch): order(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert all(len(o) == N for o in orders.values())
    assert all(order(*key) == o for key, o in orders.items())
    assert all(a != b for a, b in itertools.combinations(orders.values(), 2))
    sampler = make(TARGETS, seed=1)
    sampler.set_epoch(2)
    assert list(sampler) == list(sampler) == orders[1, 2]


@EACH
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_ranks_deal_out_one_order_and_the_end_wraps_round(make, ranks):
    whole = list(make(TARGETS))
    shares = [list(make(TARGETS, num_replicas=ranks, rank=r)) for r in range(ranks)]
    samplers = [make(TARGETS, num_replicas=ranks, rank=r) for r in range(ranks)]
    length = -(-N // ranks)
    assert [len(share) for share in shares] == [len(s) for s in samplers] == [length] * ranks
    dealt = [i for together in zip(*shares, strict=True) for i in together]
    assert dealt == (whole + whole)[: length * ranks]


def test_more_ranks_than_samples_wrap_round_more_than_once():
    shares = [list(InstanceSampler([0, 1], num_replicas=5, rank=r)) for r in range(5)]
    assert all(len(share) == 1 for share in shares)
    assert sorted(i for share in shares for i in share) in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])


@pytest.mark.parametrize("length, ranks", [(10, 1), (10, 3), (2, 3), (0, 2)])
def test_evaluation_shows_every_sample_once_in_order(length, ranks):
    samplers = [EvaluationSampler(length, num_replicas=ranks, rank=r) for r in range(ranks)]
    shares = [list(s) for s in samplers]
    assert all(share == sorted(share) for share in shares)
    assert sorted(i for share in shares for i in share) == list(range(length))
    assert [len(s) for s in samplers] == [len(share) for share in shares]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_process_group_is_asked_for_the_share(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 2)
    assert list(EvaluationSampler(9)) == [2, 5, 8]
    assert list(InstanceSampler(TARGETS)) == list(InstanceSampler(TARGETS, num_replicas=3, rank=2))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: InstanceSampler([]), ValueError, r"targets: expected integers \[N\], N >= 1"),
        (lambda: InstanceSampler([0.5]), ValueError, r"targets: .*got \[0.5\]"),
        (lambda: InstanceSampler([[0]]), ValueError, "targets: expected integers"),
        (lambda: ClassSampler([0, -1]), ValueError, "targets: .*at least 0, got -1"),
        (lambda: ClassSampler([0, 1], 2.0), ValueError, r"q: expected a number in \[0.0, 1.0\]"),
        (lambda: ProgressiveSampler([0], 0), ValueError, "epochs: expected an integer >= 1, got 0"),
        (lambda: InstanceSampler([0], num_replicas=0), ValueError, "num_replicas: .*>= 1, got 0"),
        (lambda: InstanceSampler([0], num_replicas=2, rank=2), ValueError,
         r"rank: expected an integer in \[0, 1\], got 2"),
        (lambda: InstanceSampler([0], seed=1.5), TypeError, "seed: expected an integer, got 1.5"),
        (lambda: InstanceSampler([0]).set_epoch(-1), ValueError, "epoch: .*>= 0, got -1"),
        (lambda: EvaluationSampler(-1), ValueError, "length: .*>= 0, got -1"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
