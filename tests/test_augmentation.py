"""What training does to images at random."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from elf_fast.data import Augmentation, image_transforms, small_image_transforms

pytest.importorskip("torchvision")

#: Dark on the left, bright on the right.
STEP = Image.fromarray(torch.tensor([10] * 8 + [200] * 8).byte().repeat(16, 1).numpy())
STEP = STEP.convert("RGB")
NONE = Augmentation(hflip=0.0, scale=(1.0, 1.0))


def is_mirrored(image: torch.Tensor) -> bool:
    return bool(image[0, 8, 2] > image[0, 8, -3])


@pytest.mark.parametrize("make", [small_image_transforms, image_transforms])
def test_mirroring_has_its_probability(make):
    torch.manual_seed(0)
    for hflip, seen in ((0.0, {False}), (1.0, {True}), (0.5, {False, True})):
        train = make(16, augmentation=Augmentation(hflip, (1.0, 1.0))).train
        assert {is_mirrored(train(STEP)) for _ in range(12)} == seen


def test_a_crop_keeps_the_share_asked_for():
    large = STEP.resize((64, 64), Image.Resampling.NEAREST)
    whole = image_transforms(64, augmentation=NONE)
    assert {is_mirrored(whole.train(large)) for _ in range(8)} == {False}  # both halves are there
    torch.manual_seed(0)
    tiny = image_transforms(64, augmentation=Augmentation(scale=(0.01, 0.02))).train
    flat = [float(tiny(large).std(dim=(1, 2)).max()) < 1e-3 for _ in range(12)]
    assert any(flat)


@pytest.mark.parametrize("name", ["autoaugment", "randaugment", "trivialaugment", "augmix"])
def test_policies_of_torchvision_change_images(name):
    torch.manual_seed(0)
    unchanged = image_transforms(16, augmentation=NONE).train(STEP)
    chosen = Augmentation(0.0, (1.0, 1.0), auto_augment=name)
    changed = [image_transforms(16, augmentation=chosen).train(STEP) for _ in range(6)]
    assert all(image.shape == (3, 16, 16) and image.isfinite().all() for image in changed)
    assert not all(torch.equal(image, unchanged) for image in changed)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_training_and_evaluation_scale_in_the_same_way(interpolation):
    made = image_transforms(
        8, interpolation=interpolation, augmentation=Augmentation(0, (1, 1), "randaugment")
    )
    assert made.evaluate.interpolation == interpolation
    mode = made.train.transforms[0].interpolation
    assert mode.value == interpolation
    assert made.train(STEP).shape == (3, 8, 8)


def test_erased_rectangles_have_the_mean_colour():
    torch.manual_seed(0)
    train = small_image_transforms(16, augmentation=Augmentation(0.0, erasing=1.0)).train
    white = Image.new("RGB", (16, 16), "white")
    erased = [int((train(white) == 0).all(0).sum()) for _ in range(5)]
    assert all(1 <= n < 256 for n in erased)
