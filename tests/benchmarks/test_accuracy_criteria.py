"""The comparison of criteria evaluates at the threshold that validation chose."""

from __future__ import annotations

import pytest

from benchmarks.accuracy import criteria
from elf_fast.demo.loop import predict
from elf_fast.demo.run import one_thread
from elf_fast.flops import count_flops
from elf_fast.policy import one_number


@pytest.fixture(scope="module")
def learnt():
    with one_thread():
        return criteria.trained("balanced_softmax", seed=0, epochs=8)


@pytest.mark.parametrize("criterion", ["confidence", "entropy", criteria.energy])
def test_the_network_repeats_what_is_reported_within_each_limit(learnt, criterion):
    model, data = learnt
    flops = count_flops(model, data.test.images[:1])
    found = criteria.accuracies(model, data, flops, criterion)
    for limit, (threshold, accuracy) in zip(criteria.LIMITS, found, strict=True):
        one_number.set_threshold(model, threshold)
        exits = predict(model, data.validation.images).exit_index.bincount(minlength=3).tolist()
        cheapest = flops.leaving_at(0)
        assert flops.mean(exits) <= max(limit * flops.without_exits, cheapest)
        right = predict(model, data.test.images).prediction == data.test.targets
        assert accuracy == pytest.approx(right.double().mean().item())
    assert len(set(found)) > 1
