"""Parts of a page: pictures, reliability, bars, and the files that images come from."""

from __future__ import annotations

import base64
import io
import re

import pytest
import torch
from evaluations import opened
from pages import Page
from PIL import Image

from elf_fast.data import ImageLoader, Preprocessing
from elf_fast.data.images import ImageFiles
from elf_fast.flops import count_flops
from elf_fast.page import sections
from elf_fast.page.evaluating import evaluate


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_undoes_the_preprocessing(channels):
    pixels = torch.randint(0, 256, (6, 6, 3), dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy()).convert("RGB" if channels == 3 else "L")
    transform = Preprocessing(6, "exact", mean=(0.4, 0.5, 0.6)[:channels], std=(0.2,) * channels)
    shown = sections.picture(transform(image), transform.mean, transform.std)
    assert shown.mode == image.mode and shown.tobytes() == image.tobytes()
    wild = torch.tensor([[[torch.nan, torch.inf, -9.0]]])
    assert list(sections.picture(wild, (0.5,), (0.5,)).tobytes()) == [0, 255, 0]


@pytest.mark.parametrize("size, kind, shown", [((8, 8), "png", (8, 8)),
                                               ((300, 150), "jpeg", (128, 64))])  # fmt: skip
def test_large_images_become_small_and_small_ones_stay(size, kind, shown):
    thumbnail = sections.Thumbnail(Image.new("RGB", size, "red"), "a <cat>", ["cat"])
    (image,) = Page(sections.thumbnails([thumbnail])).named("img")
    assert image["alt"] == "a <cat>" and (image.get("class") == "pixels") == (kind == "png")
    start, data = image["src"].split(",")
    assert start == f"data:image/{kind};base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == shown


def test_bins_hold_every_sample_once():
    p = torch.tensor([0.0, 0.05, 0.55, 0.59, 1.0, 0.999])
    right = torch.tensor([True, False, True, False, True, True])
    found = sections.bins(p, right, 10)
    assert found.confidence == pytest.approx([0.025, 0.57, 0.9995])
    assert found.accuracy == pytest.approx([0.5, 0.5, 1.0])
    assert found.share == pytest.approx([1 / 3] * 3)


def test_bars_of_several_classes_add_them_up():
    counts = torch.zeros(2, 80, 2, dtype=torch.int64)
    counts[0, 1, 1], counts[1, 0, 0], counts[1, 79, 1] = 3, 1, 2
    found, is_single = sections.bars([f"c{c}" for c in range(80)], list(range(80, 0, -1)), counts)
    assert not is_single and len(found) == sections.BARS
    assert found[0] == sections.Bar("c0 to c1, 2 classes", "80 to 79", 4, [0.75, 0.25], 0.75)
    assert found[-1].shares == [0.0, 1.0] and found[1].shares is None


def test_pictures_have_the_names_of_their_files_where_others_cannot_be_read(tmp_path):
    files = []
    for i in range(20):
        files.append(str(tmp_path / f"{i}.png"))
        Image.new("RGB", (4, 4), (12 * i, 255 - 12 * i, 100)).save(files[-1])
    for broken in (0, 7):
        (tmp_path / f"{broken}.png").write_text("no image")
    images = ImageFiles(files, torch.zeros(20, dtype=torch.int64), Preprocessing(4, "exact"))
    base = opened((9, 9, 9))
    base.model.thresholds = 0.0  # all leave at exit 1
    base.model.heads[0].classifier.bias.data[:] = torch.tensor([-9.0, 9.0, 0.0])  # and are wrong
    loader = ImageLoader(images, 6, skip_errors=True)
    flops = count_flops(base.model, torch.zeros(1, 3, 4, 4))
    found = evaluate("run", base._replace(images=images, batches=loader, flops=flops))
    assert found.observed.metrics["skipped"] == 2 and len(found.files) == 18
    assert len(found.observed.early_wrong) == 18
    for wrong in found.observed.early_wrong:
        number = int(re.search(r"(\d+)\.png$", found.files[wrong.sample]).group(1))
        shown = sections.picture(wrong.image, found.mean, found.std)
        assert shown.getpixel((0, 0)) == (12 * number, 255 - 12 * number, 100)
