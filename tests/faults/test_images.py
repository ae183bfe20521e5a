"""Images as cameras, scanners and scripts write them."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageOps, PngImagePlugin

pytest.importorskip("torchvision")

from torchvision.transforms import v2

from elf_fast import data
from elf_fast.data.images import read_image
from elf_fast.runs import plain
from elf_fast.runs.config import TrainConfig
from elf_fast.runs.datasets import load_splits

GREY16 = np.linspace(0, 65535, 180).astype(np.uint16).reshape(9, 20)


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def pixels(path: Path, **options: bool) -> np.ndarray:
    image = read_image(str(path), **options)
    assert image.mode == "RGB"
    return np.asarray(image)


# Depth


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bits_are_scaled_to_eight(name, tmp_path):
    if name == "a.pgm":  # big-endian, as the format wants it
        (tmp_path / name).write_bytes(b"P5 20 9 65535\n" + GREY16.astype(">u2").tobytes())
    else:
        Image.fromarray(GREY16).save(tmp_path / name)
    found = pixels(tmp_path / name)
    expected = (GREY16 / 257).round().astype(np.uint8)
    assert np.array_equal(found, np.repeat(expected[..., None], 3, axis=2))
    assert len(np.unique(found)) == 180


def test_big_endian_tiff_is_scaled(tmp_path):
    image = Image.frombytes("I;16B", (20, 9), GREY16.astype(">u2").tobytes())
    image.save(tmp_path / "a.tif")
    assert np.array_equal(pixels(tmp_path / "a.tif")[..., 0], (GREY16 / 257).round())


def test_floating_values_between_0_and_1_are_scaled_and_others_refused(tmp_path):
    values = np.linspace(0, 1, 60, dtype=np.float32).reshape(6, 10)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert np.array_equal(pixels(tmp_path / "a.tif")[..., 2], (values * 255).round())
    for wrong in (values * 3, values - 0.5, np.where(values > 0.5, np.nan, values)):
        Image.fromarray(wrong.astype(np.float32)).save(tmp_path / "b.tif")
        with pytest.raises(data.DecodeError, match="b.tif: .*expected floating values in"):
            read_image(str(tmp_path / "b.tif"))


def tiff(path: Path, values: bytes, *, bits: int, photometric: int = 1, kind: int = 1) -> Path:
    """A little-endian TIFF with one row of 16 values, of kind 1 unsigned, 2 signed, 3 floating."""
    entries = {256: 16, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1,
               279: len(values), 339: kind}  # fmt: skip
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    start = struct.pack("<4sI", b"II*\0", 8 + len(values))
    path.write_bytes(start + values + struct.pack("<H", len(entries)) + table + bytes(4))
    return path


RAMP = np.linspace(0, 1, 16)
RAMP12 = "".join(f"{round(4095 * value):012b}" for value in RAMP)


@pytest.mark.parametrize(
    "values, options, expected",
    [
        (int(RAMP12, 2).to_bytes(24, "big"), {"bits": 12}, RAMP),
        ((65535 * RAMP).astype("<u2").tobytes(), {"bits": 16, "photometric": 0}, 1 - RAMP),
        (RAMP.astype("<f4").tobytes(), {"bits": 32, "photometric": 0, "kind": 3}, 1 - RAMP),
    ],
    ids=["12 bits", "16 bits, 0 is white", "floating, 0 is white"],
)
def test_a_tiff_is_as_bright_as_its_tags_say(values, options, expected, tmp_path):
    found = pixels(tiff(tmp_path / "a.tif", values, **options))[0, :, 0]
    assert np.array_equal(found, (255 * expected).round())


@pytest.mark.parametrize(
    "kind, bits, message",
    [(1, 32, "32-bit"), (2, 8, "signed 8-bit"), (2, 16, "signed 16-bit"), (2, 32, "signed 32-bit")],
)
def test_integers_of_unknown_range_are_refused(kind, bits, message, tmp_path):
    tiff(tmp_path / "a.tif", bytes(2 * bits), bits=bits, kind=kind)
    with pytest.raises(data.DecodeError, match=f"up to 16 bits, got {message} integers"):
        read_image(str(tmp_path / "a.tif"))


# Other formats


def iptc(content: bytes) -> bytes:
    size, layers, jpeg = b"\x0a", b"\1\0", b"\5"
    fields = {(3, 60): layers, (3, 20): size, (3, 30): size, (3, 120): jpeg, (8, 10): content}
    return b"".join(struct.pack(">3BH", 28, *k, len(v)) + v for k, v in fields.items())


@pytest.mark.parametrize("wrap, form", [(bytes, "EPS"), (iptc, "IPTC")])
def test_no_file_makes_pillow_run_another_program(wrap, form, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given, **more: started.append(given))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    (tmp_path / "a.png").write_bytes(wrap(postscript))
    with pytest.raises(data.DecodeError, match=f"a.png: .*got {form}"):
        read_image(str(tmp_path / "a.png"))
    assert not started


# Orientation


def photo() -> Image.Image:
    values = np.zeros((24, 40, 3), np.uint8)
    values[:12, :20] = 200  # one bright corner
    values[12:, :20] = 100
    return Image.fromarray(values)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_photos_are_turned_as_their_exif_data_say(orientation, suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[274] = orientation
    photo().save(path, exif=exif, quality=95)
    with Image.open(path) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
        plain = np.asarray(stored.convert("RGB"))
    assert np.array_equal(pixels(path), expected)
    assert np.array_equal(pixels(path, exif_orientation=False), plain)
    bright = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1),
              8: (-1, 0)}[orientation]  # fmt: skip
    assert pixels(path)[bright].mean() > 180
    assert pixels(path).shape[:2] == ((24, 40) if orientation < 5 else (40, 24))


@pytest.mark.parametrize("exif", [b"nonsense", b"II*\0", b"II*\0\x08\0\0\0\xff\xff"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_damaged_exif_data_do_not_spoil_an_image(exif, suffix, tmp_path):
    photo().save(tmp_path / f"a.{suffix}", exif=b"Exif\0\0" + exif)
    assert pixels(tmp_path / f"a.{suffix}").shape == (24, 40, 3)


@pytest.mark.parametrize("dataset", ["folder", "lists"])
def test_the_setting_reaches_the_images(dataset, tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    (tmp_path / "x").mkdir()
    photo().save(tmp_path / "x" / "a.jpg", exif=exif)
    (tmp_path / "train.txt").write_text("x/a.jpg 0\n")
    config = {"dataset": dataset, "data_dir": str(tmp_path)}
    turned, plain = (
        load_splits(TrainConfig(**config, exif_orientation=on)).train for on in (True, False)
    )
    turned.transform = plain.transform = lambda image: image.size
    assert (turned[0][0], plain[0][0]) == ((24, 40), (40, 24))


@pytest.mark.parametrize("dataset", ["digits", "cifar100"])
def test_the_setting_is_refused_where_it_means_nothing(dataset):
    with pytest.raises(ValueError, match="exif_orientation: expected True for .*, got False"):
        TrainConfig(dataset=dataset, data_dir="x", exif_orientation=False)


# Size


@pytest.mark.parametrize("size", [(2, 20_000), (15_000, 3), (1, 4_001)])
@pytest.mark.parametrize("part", ["train", "evaluate"])
def test_long_images_cost_no_more_than_usual_ones(size, part, monkeypatch):
    made = []
    resize = Image.Image.resize

    def observed(self, size, *arguments, **options):
        made.append(size)
        return resize(self, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", observed)
    transform = getattr(data.image_transforms(56), part)
    assert transform(Image.new("RGB", size)).shape == (3, 56, 56)
    assert made and all(width * height <= 64 * 64 * 5 for width, height in made)


@pytest.mark.parametrize("size", [(50, 50), (70, 41), (33, 131), (160, 40), (1, 4)])
def test_usual_images_are_evaluated_as_before(size):
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (*size, 3), np.uint8))
    before = v2.Compose([v2.Resize(32), v2.CenterCrop(28), v2.PILToTensor()])
    found = data.image_transforms(28, mean=[0.0] * 3, std=[1 / 255] * 3).evaluate(image)
    assert torch.equal(found.round().to(torch.uint8), before(image))


@pytest.mark.parametrize("length", [601, 602, 940])
def test_the_middle_of_a_long_image_is_evaluated(length):
    ramp = np.abs(np.arange(length) - (length - 1) / 2).clip(max=255).astype(np.uint8)
    image = Image.fromarray(np.broadcast_to(ramp[None, :, None], (64, length, 3)).copy())
    before = v2.Compose([v2.Resize(32), v2.CenterCrop(28), v2.PILToTensor()])(image)
    found = data.image_transforms(28, mean=[0.0] * 3, std=[1 / 255] * 3).evaluate(image)
    assert (found - before).abs().max() < 1.6  # less than a pixel of the ramp


@pytest.mark.parametrize("size", [(12, 12), (30, 30)], ids=["Pillow warns", "Pillow raises"])
def test_decompression_bombs_are_named(size, tmp_path, monkeypatch):
    Image.new("RGB", size).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(data.DecodeError, match=r"bomb.png: .*exceeds limit of \d00 pixels"):
        read_image(str(tmp_path / "bomb.png"))
    Image.new("RGB", (10, 10)).save(tmp_path / "bomb.png")
    assert pixels(tmp_path / "bomb.png").shape == (10, 10, 3)


# Modes


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path):
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 3).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.save(tmp_path / "a.png", transparency=bytes([0, 128, 255]))
    assert pixels(tmp_path / "a.png")[0, :3].tolist() == [[10, 20, 30], [40, 50, 60], [70, 80, 90]]


def test_grey_with_alpha_one_bit_and_cmyk(tmp_path):
    Image.merge("LA", [Image.new("L", (4, 4), 77), Image.new("L", (4, 4), 0)]).save(
        tmp_path / "a.png"
    )
    assert (pixels(tmp_path / "a.png") == 77).all()
    bits = np.eye(6, dtype=bool)
    Image.fromarray(bits).save(tmp_path / "b.png")
    assert np.array_equal(pixels(tmp_path / "b.png")[..., 1], bits * 255)
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "c.tif")
    assert (pixels(tmp_path / "c.tif") == [255, 0, 0]).all()


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_the_first_frame_of_an_animation_counts(suffix, tmp_path):
    frames = [Image.new("RGB", (8, 8), (value, value, value)) for value in (30, 200, 90)]
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50)
    assert np.abs(pixels(path).astype(int) - 30).max() <= 2


def test_large_texts_in_a_png_are_no_bomb_but_an_error(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "a" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(data.DecodeError, match="a.png: cannot be read"):
        read_image(str(tmp_path / "a.png"))


def test_runs_of_before_exif_orientation_stay_without():
    recorded = plain.to_dict(TrainConfig(data_dir="photos"))
    assert plain.from_run(recorded).exif_orientation
    del recorded["exif_orientation"]
    assert not plain.from_run(recorded).exif_orientation
    assert plain.from_run(recorded, exif_orientation=True).exif_orientation
    assert plain.from_run({"dataset": "digits"}).exif_orientation  # no other value is allowed
