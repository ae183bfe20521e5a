"""Data sets, transforms and the loader, on small files that the tests write."""

import hashlib
import multiprocessing
import os
import pickle
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")

from sklearn.datasets import load_digits
from torchvision import datasets

from elf_fast import data
from elf_fast.data import digits as digits_module
from elf_fast.data import lists
from elf_fast.data.longtail import hold_out
from elf_fast.memory import is_lost_worker

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


def test_any_digit_can_be_the_head(digits):
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    ordered = data.long_tailed_digits(50.0, class_order=order)
    assert ordered.class_counts == digits.class_counts
    assert ordered.class_names == [str(digit) for digit in order]
    shown = torch.from_numpy(load_digits().target)
    for part in (ordered.train, ordered.validation, ordered.test):
        assert torch.equal(torch.tensor(order)[part.targets], shown[part.position])
    with pytest.raises(ValueError, match="class_order: expected every digit from 0 to 9 once"):
        data.long_tailed_digits(50.0, class_order=[0, 0, 2, 3, 4, 5, 6, 7, 8, 9])


def test_augmentation_repeats_with_its_generator(digits):
    images = digits.train.images[:5]
    one, two, other = (
        digits_module.augment(images, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_augmentation_turns_scales_and_shifts_within_its_limits():
    """Measured by two spots: their distance, direction and place in every image."""
    images = torch.full((400, 1, 16, 16), -1.0)
    images[..., 6:10, 6:10] = 1.0
    images[..., 6:10, 12:15] = 1.0
    found = digits_module.augment(images, torch.Generator().manual_seed(0)) + 1
    assert found.shape == images.shape
    assert found.min() >= 0 and found.max() <= 2
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    mass = found[:, 0]
    mean = torch.stack([(mass * at).sum((1, 2)) for at in (x, y)], 1) / mass.sum((1, 2))[:, None]
    dx, dy = x - mean[:, :1, None], y - mean[:, 1:, None]
    xx, xy, yy = ((mass * d).sum((1, 2)) for d in (dx * dx, dx * dy, dy * dy))
    angle = torch.atan2(2 * xy, xx - yy) / 2
    area = mass.sum((1, 2)) / (images[0] + 1).sum()
    assert 0.20 < angle.abs().max() < 0.30 and angle.min() < -0.15 < 0.15 < angle.max()
    assert 0.70 < area.min() < 0.85 and 1.15 < area.max() < 1.45
    height = mean[:, 1] - mean[:, 1].mean()
    assert 1.0 < height.abs().max() < 2.5


# CIFAR


def write_cifar(cifar, root, classes, per_class, monkeypatch):
    """An archive like CIFAR's, a share of `per_class` images in every file. Each image is of one
    colour: its class and its number in the file."""
    label = {10: "labels", 100: "fine_labels"}[classes]

    def dump(name, entry):
        path = root / cifar.base_folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(entry))
        return hashlib.md5(path.read_bytes()).hexdigest()

    for attribute in ("train_list", "test_list"):
        files = []
        for file, (name, _) in enumerate(getattr(cifar, attribute)):
            n = per_class // len(getattr(cifar, attribute))
            targets = np.arange(classes).repeat(n)[
                np.random.RandomState(file).permutation(classes * n)
            ]
            colour = np.stack([targets, np.arange(len(targets)) % 256, np.full_like(targets, file)])
            pixels = colour.T[:, :, None].repeat(32 * 32, axis=2).reshape(-1, 3 * 32 * 32)
            files.append([name, dump(name, {"data": pixels.astype(np.uint8),
                                            label: targets.tolist()})])  # fmt: skip
        monkeypatch.setattr(cifar, attribute, files)
    names = [f"class {c}" for c in range(classes)]
    meta = {**cifar.meta, "md5": dump(cifar.meta["filename"], {cifar.meta["key"]: names})}
    monkeypatch.setattr(cifar, "meta", meta)


@pytest.fixture
def plain():
    """Transforms to the values of the pixels; evaluation adds 100."""

    def pixels(image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()

    return data.Transforms(pixels, lambda image: pixels(image) + 100)


def colours(dataset):
    """[N, 3] the colour of the upper left pixel."""
    return [dataset[i][0][:, 0, 0].int().tolist() for i in range(len(dataset))]


@pytest.mark.parametrize("classes, per_class", [(10, 20), (100, 10)])
def test_cifar_lt(tmp_path, monkeypatch, plain, classes, per_class):
    cifar = {10: datasets.CIFAR10, 100: datasets.CIFAR100}[classes]
    write_cifar(cifar, tmp_path, classes, per_class, monkeypatch)
    splits = data.cifar_lt(tmp_path, classes, imbalance=10, transforms=plain)
    assert splits.class_counts == data.long_tailed_counts(per_class, classes, 10)
    assert splits.class_names == [f"class {c}" for c in range(classes)]
    assert splits.validation is None
    everything = cifar(tmp_path)
    chosen = data.long_tailed_subset(torch.tensor(everything.targets), 10, seed=0)
    train = colours(splits.train)
    assert train == everything.data[chosen, 0, 0].tolist()
    assert [c for c, _, _ in train] == splits.train.targets.tolist()
    assert [splits.train[i][1] for i in (0, -1)] == [0, classes - 1]
    assert torch.bincount(splits.test.targets).tolist() == [per_class] * classes
    assert [c - 100 for c, _, _ in colours(splits.test)] == splits.test.targets.tolist()


def test_cifar_validation_is_held_out_of_training(tmp_path, monkeypatch, plain):
    write_cifar(datasets.CIFAR10, tmp_path, 10, 20, monkeypatch)
    splits = data.cifar_lt(
        tmp_path, imbalance=4, profile="step", validation_fraction=0.1, transforms=plain
    )
    assert splits.class_counts == [18] * 5 + [4] * 5
    assert torch.bincount(splits.validation.targets).tolist() == [2] * 10
    train = {tuple(colour) for colour in colours(splits.train)}
    validation = {tuple(v - 100 for v in colour) for colour in colours(splits.validation)}
    assert len(train) == 110 and len(validation) == 20 and not train & validation
    assert {colour[0] for colour in validation} == set(range(10))


def test_cifar_says_what_to_put_where(tmp_path, monkeypatch):
    with pytest.raises(data.DataError, match="cifar-10-batches-py of https://.*data_batch_1, .*"
                                             "batches.meta. Unpack"):  # fmt: skip
        data.cifar_lt(tmp_path)
    write_cifar(datasets.CIFAR10, tmp_path, 10, 5, monkeypatch)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"cut short")
    with pytest.raises(data.DataError, match="missing or damaged: data_batch_3. Unpack"):
        data.cifar_lt(tmp_path)
    with pytest.raises(ValueError, match="classes: expected 10 or 100, got 20"):
        data.cifar_lt(tmp_path, 20)


# Image folders


def write_image(path, value, size=(8, 8)):
    """A grey image of one value; the format follows from the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


def write_folder(root, **counts):
    """root/<class>/<i>.png, PNG and JPEG by turns, of value 10 class + i."""
    for c, (name, count) in enumerate(counts.items()):
        for i in range(count):
            write_image(root / name / f"{i:02}.{'png' if i % 2 else 'jpg'}", 10 * c + i)


def values(dataset):
    """[N] the value of every image."""
    return [int(dataset[i][0][0, 0, 0]) for i in range(len(dataset))]


def test_a_folder_as_it_is(tmp_path, plain):
    write_folder(tmp_path, a=4, b=3)
    splits = data.image_folder(tmp_path, transforms=plain)
    assert splits.validation is None and splits.test is None
    assert splits.class_names == ["a", "b"] and splits.class_counts == [4, 3]
    assert splits.train.targets.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert values(splits.train) == [0, 1, 2, 3, 10, 11, 12]
    assert splits.train[4][0].shape == (3, 8, 8) and splits.train[4][1] == 1


def test_a_folder_in_parts_keeps_the_labels_of_training(tmp_path, plain):
    write_folder(tmp_path / "train", a=2, b=1, c=1)
    write_folder(tmp_path / "validation", b=1)
    write_folder(tmp_path / "test", a=1, c=2)
    splits = data.image_folder(tmp_path, transforms=plain)
    assert splits.train.targets.tolist() == [0, 0, 1, 2]
    assert splits.validation.targets.tolist() == [1]
    assert splits.test.targets.tolist() == [0, 2, 2]
    assert values(splits.validation) == [100] and values(splits.test) == [100, 110, 111]
    with pytest.raises(ValueError, match="validation_fraction: expected 0, since .*validation is"):
        data.image_folder(tmp_path, validation_fraction=0.1)
    write_folder(tmp_path / "test", z=1)
    with pytest.raises(data.DataError, match="test: expected only classes of .* got 1 more: z"):
        data.image_folder(tmp_path)


def test_parts_without_images_are_refused(tmp_path, plain):
    write_folder(tmp_path / "train", a=1, b=1)
    with pytest.raises(ValueError, match="validation_fraction: expected 0 where no class has two"):
        data.image_folder(tmp_path, validation_fraction=0.5)
    (tmp_path / "test" / "a").mkdir(parents=True)
    with pytest.raises(data.DataError, match="test: expected images in its class folders, got no"):
        data.image_folder(tmp_path)


def test_a_folder_made_long_tailed_after_validation_is_held_out(tmp_path, plain):
    write_folder(tmp_path, a=10, b=10, c=10)
    splits = data.image_folder(
        tmp_path, imbalance=4, validation_fraction=0.2, seed=3, transforms=plain
    )
    assert splits.class_counts == [8, 4, 2]
    assert torch.bincount(splits.validation.targets).tolist() == [2, 2, 2]
    assert [v // 10 for v in values(splits.train)] == splits.train.targets.tolist()
    held_out = [v - 100 for v in values(splits.validation)]
    assert [v // 10 for v in held_out] == splits.validation.targets.tolist()
    assert not set(values(splits.train)) & set(held_out)
    step = data.image_folder(tmp_path, imbalance=5, profile="step", transforms=plain)
    assert step.class_counts == [10, 2, 2]


def test_a_folder_that_is_none_is_named(tmp_path):
    with pytest.raises(data.DataError, match="root: expected a folder .*nowhere"):
        data.image_folder(tmp_path / "nowhere")


# Lists


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """A small "Places-LT", by the files of its lists."""
    train = {"images/inn/1.png": 0, "images/inn/a b.jpg": 0, "images/zoo/1.png": 1}
    test = {"images/zoo/2.png": 1}
    for name, entries in (("train", train), ("test", test)):
        for value, path in enumerate(entries):
            write_image(tmp_path / path, value)
        text = "".join(f"{path} {label}\n" for path, label in entries.items())
        (tmp_path / f"Places_LT_{name}.txt").write_text(text)
    facts = lists.Facts(
        {"train": ("Places_LT_train.txt", 3), "test": ("Places_LT_test.txt", 1)}, 2, 2, 1
    )
    monkeypatch.setitem(data.PUBLISHED, "Places-LT", facts)
    return tmp_path


def test_published_lists(listed, plain):
    splits = data.published("Places-LT", listed, transforms=plain)
    assert splits.train.targets.tolist() == [0, 0, 1] and splits.class_counts == [2, 1]
    assert splits.test.targets.tolist() == [1] and splits.validation is None
    assert splits.class_names == ["inn", "zoo"]
    assert values(splits.train) == [0, 1, 2] and values(splits.test) == [100]


def test_own_lists(listed, plain):
    train = listed / "Places_LT_train.txt"
    (listed / "other.txt").write_text("images/zoo/2.png 1\n")
    splits = data.from_lists(listed, train, validation=listed / "other.txt", transforms=plain)
    assert splits.class_counts == [2, 1] and values(splits.validation) == [100]
    assert splits.test is None
    (listed / "flat.txt").write_text("images/inn/1.png 0\r\n\nimages/inn/a b.jpg\t1\n")
    splits = data.from_lists(listed, listed / "flat.txt", transforms=plain)
    assert splits.class_names == ["0", "1"] and values(splits.train) == [0, 1]


def test_a_list_may_begin_with_a_mark(listed):
    """Of the byte order, as editors of Windows write it."""
    (listed / "mark.txt").write_text("images/inn/1.png 0\n", encoding="utf-8-sig")
    assert data.from_lists(listed, listed / "mark.txt").class_names == ["inn"]


def test_class_names_do_not_change_when_the_images_move(tmp_path):
    for name in ("1.png", "sub/2.png"):
        write_image(tmp_path / "images" / name, 0)
    (tmp_path / "list.txt").write_text("1.png 0\nsub/2.png 1\n")
    for root in (tmp_path / "images", f"{tmp_path}/images/"):
        assert data.from_lists(root, tmp_path / "list.txt").class_names == ["0", "1"]
    (tmp_path / "list.txt").write_text("./1.png 0\nsub/2.png 1\n")
    assert data.from_lists(tmp_path / "images", tmp_path / "list.txt").class_names == ["0", "1"]


@pytest.mark.parametrize(
    "lines, message",
    [
        ("images/inn/1.png -1", "expected labels from 0 on, got 1 others: line 1 (-1)"),
        (f"images/inn/1.png {'9' * 5000}", "got 1 malformed: line 1 ('images/inn/1.png 99"),
    ],
)
def test_labels_that_no_class_can_have_are_refused(lines, message, listed):
    (listed / "train.txt").write_text(lines)
    with pytest.raises(data.DataError) as error:
        data.from_lists(listed, listed / "train.txt")
    assert f"{listed}/train.txt: " in str(error.value) and message in str(error.value)


def test_an_image_of_two_parts_is_refused(listed):
    train, test = listed / "train.txt", listed / "test.txt"
    train.write_text("images/inn/1.png 0\nimages/inn/1.png 0\nimages/zoo/1.png 1\n")
    assert len(data.from_lists(listed, train).train) == 3
    test.write_text("images/zoo/2.png 1\nimages/inn/1.png 0\n")
    with pytest.raises(data.DataError, match=r"test.txt: .* the train list .*, got 1 .*inn/1.png$"):
        data.from_lists(listed, train, test=test)
    test.write_text("images/zoo/2.png 1\n./images/zoo/../zoo/1.png 1\n")
    with pytest.raises(data.DataError, match=r"test.txt: .*, got 1 that it has: .*zoo/1.png$"):
        data.from_lists(listed, train, test=test)
    test.write_text("images/zoo/2.png 1\n")  # there may be no public labels for another test part
    assert len(data.from_lists(listed, train, test, test).test) == 1


def test_all_that_is_wrong_with_lists_is_said_at_once(listed):
    train, test = listed / "Places_LT_train.txt", listed / "Places_LT_test.txt"
    train.write_text("images/inn/1.png 0\n\nnothing\nimages/inn/1.png one\n"
                     "images/gone/1.png 0\nimages/gone/2.png 0\nimages/zoo/1.png 1\n")  # fmt: skip
    test.write_text("images/zoo/2.png 2\nimages/zoo/2.png -1\n")
    with pytest.raises(data.DataError) as error:
        data.published("Places-LT", listed)
    assert str(error.value).splitlines() == [
        f"{train}: expected lines 'relative/path label', got 2 malformed: line 3 ('nothing'), "
        "line 4 ('images/inn/1.png one')",
        f"{train}: expected 3 images, got 4",
        f"{train}: expected 2 images of the largest class and 1 of the smallest, got 3 and 1",
        f"{train}: 2 of 4 images are missing: {listed}/images/gone/1.png, "
        f"{listed}/images/gone/2.png",
        f"{test}: expected labels from 0 to 1, got 2 others: line 1 (2), line 2 (-1)",
        f"{test}: expected 1 images, got 2",
    ]


def test_missing_lists_empty_classes_and_unknown_names(listed):
    (listed / "Places_LT_test.txt").unlink()
    with pytest.raises(
        data.DataError, match=r"LT_test.txt: expected a list of images, got no file"
    ):
        data.published("Places-LT", listed)
    (listed / "gap.txt").write_text("images/inn/1.png 0\nimages/zoo/1.png 7\n")
    with pytest.raises(data.DataError, match="every class, 6 have none: 1, 2, 3, 4, 5, ...$"):
        data.from_lists(listed, listed / "gap.txt")
    (listed / "far.txt").write_text(f"images/inn/1.png {10**15}\n")
    with pytest.raises(data.DataError, match="every class, 1,000,000,000,000,000 have none: 0, 1"):
        data.from_lists(listed, listed / "far.txt")
    (listed / "empty.txt").write_text("\n")
    with pytest.raises(data.DataError, match="^.*empty.txt: expected images, got none$"):
        data.from_lists(listed, listed / "empty.txt")
    with pytest.raises(data.DataError, match="^.*empty.txt: expected images, got none$"):
        data.from_lists(listed, listed / "Places_LT_train.txt", listed / "empty.txt")
    with pytest.raises(ValueError, match="name: expected one of ImageNet-LT, .* got 'ImageNet'"):
        data.published("ImageNet", listed)


def test_known_totals_agree_with_images_per_class():
    def evaluation(name):
        facts = data.PUBLISHED[name]
        totals = {part: total for part, (_, total) in facts.lists.items() if part != "train"}
        return {part: total / facts.classes for part, total in totals.items()}

    assert evaluation("ImageNet-LT") == {"validation": 20, "test": 50}
    assert evaluation("Places-LT") == {"validation": 20, "test": 100}
    assert evaluation("iNaturalist-2018") == {"validation": 3}


# Transforms


def random_image(height, width):
    pixels = np.random.RandomState(0).randint(0, 256, (height, width, 3), dtype=np.uint8)
    return pixels, Image.fromarray(pixels)


@pytest.mark.parametrize(
    "transforms, size, crop",
    [
        (data.small_image_transforms, 32, slice(0, 32)),
        (data.image_transforms, 14, slice(1, 15)),  # 16 is 8/7 of 14: nothing to scale
    ],
)
def test_evaluation_normalises_and_does_nothing_at_random(transforms, size, crop):
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    pixels, image = random_image(*[16 if size == 14 else 32] * 2)
    one = transforms(size, mean=mean, std=std).evaluate(image)
    expected = (pixels[crop, crop].astype(np.float64) / 255 - mean) / std
    assert type(one) is torch.Tensor and one.dtype == torch.float32
    np.testing.assert_allclose(one.permute(1, 2, 0).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("part", ["train", "evaluate"])
def test_small_images_have_their_size_already(part):
    transform = getattr(data.small_image_transforms(16), part)
    with pytest.raises(ValueError, match="expected an image of 16x16 pixels, got 17x16"):
        transform(Image.new("RGB", (17, 16)))


def test_small_images_are_shifted_and_mirrored():
    pixels, image = random_image(16, 16)
    train = data.small_image_transforms(16, mean=[0.0] * 3, std=[1.0] * 3).train
    padded = np.pad(pixels, ((2, 2), (2, 2), (0, 0)))
    possible = {}
    for y in range(5):
        for x in range(5):
            part = padded[y : y + 16, x : x + 16]
            possible |= {part.tobytes(): (y, x, 0), part[:, ::-1].tobytes(): (y, x, 1)}
    torch.manual_seed(0)
    seen = {
        possible[(train(image) * 255).round().byte().permute(1, 2, 0).numpy().tobytes()]
        for _ in range(100)
    }
    assert len(seen) > 30


def test_large_images_are_cut_and_mirrored():
    """Red rises with the column, green with the row: so an image shows where it was cut."""
    y, x = np.mgrid[:40, :60]
    image = Image.fromarray(np.stack([4 * x, 4 * y, 0 * x], axis=2).astype(np.uint8))
    transforms = data.image_transforms(16, mean=[0.0] * 3, std=[4 / 255] * 3)
    torch.manual_seed(0)
    images = [transforms.train(image) for _ in range(40)]
    assert all(image.shape == (3, 16, 16) for image in images)
    columns = torch.stack([image[0].mean(0) for image in images])
    rows = torch.stack([image[1].mean(1) for image in images])
    mirrored = columns[:, 0] > columns[:, -1]
    assert 10 < mirrored.sum() < 30
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    for places, size in ((columns, 60), (rows, 40)):
        assert bool((places.diff() > -0.5).all())  # never turned
        assert places[:, 0].min() < 3 and places[:, -1].max() > size - 4
        assert len(places[:, 0].round().unique()) > 8 and places.diff().mean(1).std() > 0.2
    whole = transforms.evaluate(image)
    assert whole.shape == (3, 16, 16)
    for channel, middle in ((0, 29.5), (1, 19.5)):
        assert whole[channel].mean().item() == pytest.approx(middle, abs=1.5)


# Files that are not images


def spoil(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
def test_a_file_cut_short_is_named(tmp_path, suffix):
    _, image = random_image(32, 32)
    path = tmp_path / f"cut.{suffix}"
    image.save(path)
    spoil(path)
    with pytest.raises(data.DecodeError, match=f"cut.{suffix}: cannot be read") as error:
        data.images.read_image(str(path))
    assert error.value.path == str(path)


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_what_is_no_image_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(data.DecodeError, match="x.jpg: cannot be read"):
        data.images.read_image(str(tmp_path / "x.jpg"))


@pytest.mark.parametrize("mode, suffix", [("L", "png"), ("RGBA", "png"), ("P", "png"),
                                          ("CMYK", "jpg"), ("1", "png")])  # fmt: skip
def test_every_kind_of_image_becomes_rgb(tmp_path, mode, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode).save(path)
    image = data.images.read_image(str(path))
    assert image.mode == "RGB" and image.getpixel((4, 4)) == (255, 255, 255)


# The loader


class Reversed:
    """A sampler that remembers its epoch."""

    epoch = None

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __iter__(self):
        return iter(range(self.n - 1, -1, -1))

    def set_epoch(self, epoch):
        self.epoch = epoch


class Noise(torch.utils.data.Dataset):
    """Images from the three generators that augmentation may use; targets are their indices."""

    def __init__(self, n):
        self.targets = torch.arange(n)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return torch.tensor([torch.rand(()), np.random.rand(), random.random()]).view(
            3, 1, 1
        ), index


class Process(Noise):
    """Targets are the processes that load them."""

    def __getitem__(self, index):
        return torch.zeros(3, 1, 1), os.getpid()


@pytest.fixture
def folder(tmp_path):
    """Ten images of value 0..9 in one class."""
    for i in range(10):
        write_image(tmp_path / "a" / f"{i}.png", i)
    evaluate = data.image_transforms(7, mean=[0.0] * 3, std=[1 / 255] * 3).evaluate
    return data.image_folder(tmp_path, transforms=data.Transforms(evaluate, evaluate)).train


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("channels_last", [False, True])
def test_batches_hold_the_samplers_images_in_the_asked_format(folder, workers, channels_last):
    loader = data.ImageLoader(
        folder, 4, sampler=Reversed(10), workers=workers, channels_last=channels_last
    )
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    images = torch.cat([images for images, _ in batches])
    assert images.shape == (10, 3, 7, 7) and images.dtype == torch.float32
    assert images[:, 0, 3, 3].round().tolist() == list(range(9, -1, -1))
    first, targets = batches[0]
    assert first.stride() == ((147, 1, 21, 3) if channels_last else (147, 49, 7, 1))
    assert targets.tolist() == [0] * 4 and targets.dtype == torch.int64
    assert len(list(data.ImageLoader(folder, 4, drop_last=True))) == 2


def test_what_is_random_follows_from_seed_and_epoch_alone():
    def epoch(workers, number=0, seed=5, start=0):
        loader = data.ImageLoader(Noise(10), 3, workers=workers, seed=seed)
        loader.set_epoch(number, start)
        return torch.cat([images for images, _ in loader]).flatten()

    state = torch.get_rng_state()
    one = epoch(0)
    assert torch.equal(one, epoch(0)) and torch.equal(one, epoch(1)) and torch.equal(one, epoch(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(set(one.tolist())) == 30
    assert torch.equal(one[18:], epoch(2, start=2))
    for other in (epoch(2, number=1), epoch(2, seed=6)):
        assert not set(one.tolist()) & set(other.tolist())


def test_the_calling_process_keeps_its_generators():
    def draws():
        return [torch.rand(()).item(), np.random.rand(), random.random()]

    def seed():
        torch.manual_seed(1), np.random.seed(1), random.seed(1)

    seed()
    expected = draws()
    seed()
    for _ in data.ImageLoader(Noise(4), 2):
        pass
    assert draws() == expected


def test_workers_live_on_from_epoch_to_epoch():
    loader = data.ImageLoader(Process(8), 1, sampler=(sampler := Reversed(8)), workers=2)
    epochs = []
    for number in range(2):
        loader.set_epoch(number)
        assert sampler.epoch == number
        epochs.append({int(process) for _, process in loader})
    assert epochs[0] == epochs[1] and len(epochs[0]) == 2 and os.getpid() not in epochs[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_file_is_named_or_skipped_and_counted(folder, workers):
    bad = [folder.paths[i] for i in (1, 4, 5, 6, 7)]
    for path in bad:
        spoil(Path(path))
    with pytest.raises(data.DecodeError, match="1.png: cannot be read as an image"):
        list(data.ImageLoader(folder, 4, workers=workers))
    loader = data.ImageLoader(folder, 4, workers=workers, skip_errors=True)
    for epoch in (1, 2):
        batches = [images[:, 0, 3, 3].round().tolist() for images, _ in loader]
        assert batches == [[0, 2, 3], [8, 9]]  # the batch of 4 to 7 is left out
        assert loader.skipped == dict.fromkeys(bad, epoch)
    loader = data.ImageLoader(
        folder, 4, workers=workers, skip_errors=True, image_shape=folder[0][0].shape
    )
    shapes = [(images.shape, targets.shape) for images, targets in loader]
    assert shapes == [((n, 3, *folder[0][0].shape[1:]), (n,)) for n in (3, 0, 2)]


class Calling(Noise):
    """Calls a function with the index of the sample instead of loading it."""

    def __init__(self, function):
        super().__init__(4)
        self.function = function

    def __getitem__(self, index):
        self.function(index)
        return torch.zeros(3, 1, 1), index


def test_a_worker_that_ends_is_one_error():
    def die(index):
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    said = r"workers: expected .*, got an end \(DataLoader worker \(pid.* shared memory .*--workers"
    for _ in range(3):  # torch raises one error or another
        with pytest.raises(data.WorkerError, match=said) as error:
            list(data.ImageLoader(Calling(die), 1, workers=1))
        assert is_lost_worker(error.value.__cause__)


@pytest.fixture
def ended_workers():
    """A worker whose data set raised does not end when torch asks it to."""
    yield
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGUSR2)
        worker.join()


@pytest.mark.usefixtures("ended_workers")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", [RuntimeError, ConnectionResetError, EOFError])
def test_errors_of_a_data_set_are_its_own(kind, workers):
    def fail(index):
        raise kind("mine")

    with pytest.raises(kind, match="mine") as error:
        list(data.ImageLoader(Calling(fail), 1, workers=workers))
    assert type(error.value) is kind


def test_ctrl_c_leaves_the_workers_to_their_parent(capfd):
    """Their thread that hands over batches would print that the parent has gone."""

    def interrupt(index):
        os.kill(os.getpid(), signal.SIGINT)
        for error in (ConnectionResetError("gone"), EOFError("gone"), ValueError("other")):
            sys.excepthook(type(error), error, None)

    assert len(list(data.ImageLoader(Calling(interrupt), 4, workers=1))) == 1
    said = capfd.readouterr().err
    assert "ValueError: other" in said and "gone" not in said


def test_data_sets_travel_to_spawned_workers(folder):
    copy = pickle.loads(pickle.dumps(folder))
    assert torch.equal(copy[3][0], folder[3][0])


def test_a_negative_seed_is_refused(folder):
    with pytest.raises(ValueError, match="seed: expected a finite number >= 0"):
        data.ImageLoader(folder, 4, seed=-1)
