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
