"""Data sets, transforms and the loader, on small files that the tests write."""

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")


from elf_fast import data
from elf_fast.data import digits as digits_module
from elf_fast.data.longtail import hold_out

# Which samples


def test_counts_follow_the_exponential_profile():
    assert data.long_tailed_counts(100, 3, 100) == [100, 10, 1]
    assert data.long_tailed_counts(104, 10, 50) == [104, 67, 43, 28, 18, 11, 7, 4, 3, 2]
    assert data.long_tailed_counts(98, 2, 49) == [98, 2]  # exact: not rounded down to 1
    assert data.long_tailed_counts(10, 4, 1) == [10, 10, 10, 10]


@pytest.mark.parametrize(
    "classes, imbalance, total", [(10, 10, 20_431), (10, 100, 12_406), (100, 10, 19_573),
                                  (100, 100, 10_847)]
)  # fmt: skip
def test_cifar_has_its_published_totals(classes, imbalance, total):
    counts = data.long_tailed_counts(50_000 // classes, classes, imbalance)
    assert sum(counts) == total
    assert counts[-1] == 50_000 // classes // imbalance


@pytest.mark.parametrize("imbalance", [10, 20, 50, 100, 200, 500])
@pytest.mark.parametrize("classes", [10, 100])
def test_counts_equal_the_published_formula_in_plain_floats(classes, imbalance):
    n_max, f = 50_000 // classes, 1 / imbalance
    expected = [int(n_max * f ** (i / (classes - 1.0))) for i in range(classes)]
    assert data.long_tailed_counts(n_max, classes, imbalance) == expected


def test_counts_follow_the_step_profile():
    assert data.long_tailed_counts(500, 4, 100, "step") == [500, 500, 5, 5]
    assert data.long_tailed_counts(7, 5, 2, "step") == [7, 7, 3, 3, 3]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((100, 1, 10.0), "classes: expected at least 2, got 1"),
        ((100, 10, 0.5), "imbalance: expected a finite number >= 1.0, got 0.5"),
        ((6, 2, 50), r"imbalance: expected at most 6.*got 50"),
        ((100, 10, 10.0, "linear"), "profile: expected one of exponential, step, got 'linear'"),
    ],
)
def test_counts_refuse_what_has_no_profile(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.long_tailed_counts(*arguments)


@pytest.fixture
def mixed():
    """[60] targets of three classes of 20, in mixed order."""
    return torch.arange(3).repeat(20)[
        torch.randperm(60, generator=torch.Generator().manual_seed(1))
    ]


@pytest.mark.parametrize("seed", [0, 7])
def test_the_choice_is_the_one_of_numpys_global_generator(mixed, seed):
    before = np.random.get_state()
    chosen = data.long_tailed_subset(mixed, 10, seed=seed)
    assert all(map(np.array_equal, before[1:3], np.random.get_state()[1:3]))
    np.random.seed(seed)
    expected = []
    for c, n in enumerate([20, 6, 2]):
        indices = np.where(np.array(mixed.tolist()) == c)[0]
        np.random.shuffle(indices)
        expected.extend(indices[:n].tolist())
    np.random.set_state(before)
    assert chosen.tolist() == expected


def test_every_class_is_shared_out():
    targets = torch.tensor([0] * 40 + [1] * 10 + [2] * 2 + [3])
    targets = targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))]
    kept, held_out = hold_out(targets, 0.1, seed=0)
    assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(53))
    assert torch.bincount(targets[held_out]).tolist() == [4, 1, 1]
    assert torch.bincount(targets[kept]).tolist() == [36, 9, 1, 1]
    assert torch.equal(hold_out(targets, 0.1, seed=0)[1], held_out)
    assert not torch.equal(hold_out(targets, 0.1, seed=1)[1], held_out)
    with pytest.raises(ValueError, match="validation_fraction: expected .* got 1"):
        hold_out(targets, 1, seed=0)


# Digits


@pytest.fixture(scope="module")
def digits():
    return data.long_tailed_digits(50.0)


def test_digits_are_disjoint_and_balanced_and_training_is_long_tailed(digits):
    parts = [set(p.position.tolist()) for p in (digits.train, digits.validation, digits.test)]
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert torch.bincount(digits.validation.targets).tolist() == [20] * 10
    assert torch.bincount(digits.test.targets).tolist() == [50] * 10
    assert digits.class_counts == [104, 67, 43, 28, 18, 11, 7, 4, 3, 2]
    assert digits.train.images.shape == (287, 1, 16, 16)
    assert -1 <= digits.train.images.min() < digits.train.images.max() <= 1
    image, target = digits.train[3]
    assert torch.equal(image, digits.train.images[3]) and target == digits.train.targets[3]


def test_same_seed_same_digits_other_seed_other_digits(digits):
    again = data.long_tailed_digits(50.0)
    assert torch.equal(digits.train.position, again.train.position)
    assert torch.equal(digits.test.position, again.test.position)
    other = data.long_tailed_digits(50.0, seed=1)
    assert not torch.equal(digits.test.position, other.test.position)


def test_augmentation_keeps_shape_and_repeats_with_its_generator(digits):
    images = digits.train.images[:5]
    one, two = (
        digits_module.augment(images, torch.Generator().manual_seed(3)) for _ in range(2)
    )  # fmt: skip
    assert one.shape == images.shape and torch.equal(one, two) and not torch.equal(one, images)
