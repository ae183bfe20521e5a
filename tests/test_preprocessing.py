"""The evaluation transform as data: what it computes, what a file may hold of it."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from elf_fast.data import Preprocessing

RAW = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255,) * 3}  # pixels as they are


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def test_crop_sees_the_centre_of_the_scaled_image():
    image = picture(20, 8)
    found = Preprocessing(7, resize=8, **RAW)(image)  # nothing to scale
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    left = round((20 - 7) / 2)
    torch.testing.assert_close(found, pixels[:, 0:7, left : left + 7])


def test_squash_keeps_all_of_the_image():
    image = picture(12, 5)
    found = Preprocessing(6, "squash", interpolation="bicubic", **RAW)(image)
    expected = np.array(image.resize((6, 6), Image.Resampling.BICUBIC))
    torch.testing.assert_close(found, torch.from_numpy(expected).permute(2, 0, 1).float())


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_every_mode_becomes_three_channels_or_one(mode):
    image = picture(9, 9, mode)
    assert Preprocessing(9, "exact")(image).shape == (3, 9, 9)
    grey = Preprocessing(9, "exact", mean=(0.0,), std=(1 / 255,))
    found = grey(image)
    assert grey.shape == found.shape == (1, 9, 9)
    torch.testing.assert_close(found[0].numpy(), np.array(image.convert("L")).astype(np.float32))


@pytest.mark.parametrize(
    "transform",
    [
        Preprocessing(224),
        Preprocessing(96, resize=100, interpolation="bicubic", exif_orientation=False),
        Preprocessing(16, "squash", mean=[0.5], std=[0.25]),
    ],
)
def test_goes_through_json_and_pickle(transform):
    transform(picture(300, 200))  # what it keeps for the next call must not be in the way
    assert Preprocessing.from_dict(json.loads(json.dumps(transform.to_dict()))) == transform
    copy = pickle.loads(pickle.dumps(transform))
    assert copy == transform
    torch.testing.assert_close(copy(picture(99, 98)), transform(picture(99, 98)))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"size": 0}, ValueError, r"size: expected an integer in \[1, 16384\], got 0"),
        ({"size": 32.0}, TypeError, "size: expected an integer, got"),
        ({"fit": "pad"}, ValueError, "fit: expected one of crop, squash, exact, got 'pad'"),
        ({"fit": ["crop"]}, ValueError, r"fit: expected one of .*, got \['crop'\]"),
        ({"interpolation": "cubic"}, ValueError, "interpolation: expected one of nearest, .*cubic"),
        ({"resize": 31}, ValueError, r"resize: expected an integer in \[32, 32768\], got 31"),
        ({"fit": "exact", "resize": 32}, ValueError, "resize: expected None with fit='exact', got"),
        ({"mean": (0.5, 0.5)}, ValueError, "mean, std: expected 3 numbers each, or 1 .* 2 and 3"),
        ({"mean": (0.5,)}, ValueError, "mean, std: expected 3 numbers each, or 1 .* 1 and 3"),
        ({"std": (0.0,) * 3}, ValueError, "std: expected a number in"),
        ({"mean": ("a",) * 3}, TypeError, "mean: "),
        ({"mean": (float("nan"),) * 3}, ValueError, "mean: "),
        ({"exif_orientation": 1}, TypeError, "exif_orientation: expected True or False, got 1"),
    ],
)
def test_refuses(wrong, error, message):
    with pytest.raises(error, match=message):
        Preprocessing(**{"size": 32, **wrong})


@pytest.mark.parametrize("values", [None, [], {}, {**Preprocessing(8).to_dict(), "crop": 1}])
def test_refuses_entries_of_another_kind(values):
    with pytest.raises(ValueError, match=r"preprocessing: expected the entries \['exif_orient"):
        Preprocessing.from_dict(values)


def test_refuses_text_for_numbers():
    with pytest.raises(TypeError, match="mean: expected a list of numbers, got '123'"):
        Preprocessing.from_dict({**Preprocessing(8).to_dict(), "mean": "123"})


def photo() -> Image.Image:
    """An image with smooth areas and noise, as photos have them, of 640x480 pixels."""
    return picture(16, 12).resize((640, 480), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "swin_t", "vit_b_16"])
def test_computes_what_the_preset_of_torchvision_computes(name):
    models = pytest.importorskip("torchvision.models")
    for weights in models.get_model_weights(name):
        preset = weights.transforms()
        found = Preprocessing.from_torchvision(preset)
        torch.testing.assert_close(found(photo()), preset(photo()), atol=1e-5, rtol=0)
        assert Preprocessing.of(preset) == found


@pytest.mark.parametrize(
    "name",
    [
        "resnet50.a1_in1k",  # crop_pct 0.95, bicubic
        "vit_base_patch16_224.augreg_in1k",  # 0.9, mean 0.5
        "tf_efficientnet_lite0.in1k",
        "convnext_base.clip_laion2b_augreg_ft_in12k_in1k_384",  # squash, 1.0
    ],
)
def test_computes_what_timms_evaluation_transform_computes(name):
    timm = pytest.importorskip("timm")
    from timm.data import create_transform, resolve_data_config

    config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    theirs = create_transform(**config, is_training=False)
    found = Preprocessing.from_timm(config)
    for image in (photo(), photo().rotate(90, expand=True)):
        torch.testing.assert_close(found(image), theirs(image), atol=1e-5, rtol=0)
    assert Preprocessing.of(config) == found


TIMM = {"input_size": (3, 32, 32), "interpolation": "bicubic", "mean": (0.5,) * 3,
        "std": (0.5,) * 3, "crop_pct": 0.9, "crop_mode": "center"}  # fmt: skip


@pytest.mark.parametrize(
    "given, error, message",
    [
        (TIMM | {"crop_mode": "border"}, ValueError, "crop_mode: expected 'center', or 'squash'"),
        (TIMM | {"crop_mode": "squash"}, ValueError, "got 'squash' and 0.9"),
        (TIMM | {"input_size": (3, 32, 48)}, ValueError, "input_size: expected one size"),
        (TIMM | {"interpolation": "random"}, ValueError, "interpolation: expected one of"),
        ({"mean": 3}, TypeError, "config: expected what timm.data.resolve_model_data_config"),
        (3, TypeError, "transform: expected a data.Preprocessing, the transforms"),
    ],
)
def test_refuses_transforms_that_it_cannot_repeat(given, error, message):
    with pytest.raises(error, match=message):
        Preprocessing.of(given)
