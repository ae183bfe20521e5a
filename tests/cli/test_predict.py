"""`elf-fast predict` and its twin in Python."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from run_cases import printed, refused

import elf_fast
from elf_fast import cli
from elf_fast.data import DecodeError, image_paths
from elf_fast.data.splits import DataError
from elf_fast.policy import Policy
from elf_fast.runs.predict import predict


@pytest.fixture(scope="module")
def model(run):
    return elf_fast.load(run)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A folder of four images, one of them in a subfolder, with something else beside them."""
    root = tmp_path_factory.mktemp("images")
    (root / "sub" / "deep").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    Image.fromarray(pixels[..., :3]).save(root / "a.png")
    Image.fromarray(pixels).convert("CMYK").save(root / "b.tif")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(root / "sub" / "c.png")
    Image.fromarray(pixels).convert("P").save(root / "sub" / "deep" / "d.gif")
    (root / "notes.md").write_text("mine")
    return root


def test_it_says_what_eval_counts(run, folder, capsys, tmp_path):
    """The same images by way of `eval`, in its metrics, and of `predict`."""
    expected = json.loads((run / "metrics.json").read_text())["test"]
    lines = printed(capsys, "predict", run, folder / "test", "--json").splitlines()
    found = [json.loads(line) for line in lines]
    right = [Path(one["path"]).parent.name == one["class"] for one in found]
    assert sum(right) / len(right) == expected["overall"] and len(right) == 24
    shares = np.bincount([one["exit_index"] for one in found], minlength=3) / 24
    assert shares.tolist() == expected["exit_shares"]
    few = printed(capsys, "predict", run, folder / "test", "--json", "--batch", 5, "--workers", 2)
    for one, line in zip(found, few.splitlines(), strict=True):  # other batches
        other = json.loads(line)
        assert (other["path"], other["class"]) == (one["path"], one["class"])
        assert other["confidence"] == pytest.approx(one["confidence"], abs=1e-5)


def test_the_python_twin_says_what_the_model_says(model, folder):
    paths = sorted(map(str, (folder / "test").glob("*/*.png")))
    found = list(predict(model, paths, batch_size=7, top_k=9, exit_probabilities=True))
    images = torch.stack([model.transform.read(path) for path in paths])
    with torch.inference_mode():
        out = model(images)
    assert [one.path for one in found] == paths
    assert [one.prediction for one in found] == out.prediction.tolist()
    assert [one.exit_index for one in found] == out.exit_index.tolist()
    confidence = [one.confidence for one in found]
    torch.testing.assert_close(torch.tensor(confidence), out.confidence)
    for one in found:
        assert len(one.top) == 3 and sum(g.probability for g in one.top) == pytest.approx(1.0)
        assert one.top[0][:2] == (one.prediction, one.class_name)
        assert one.exits[one.exit_index].probability == pytest.approx(one.confidence, abs=1e-5)
    assert not model.training


def test_inputs_are_files_folders_and_lists_in_their_order(images, tmp_path, monkeypatch):
    names = ["a.png", "b.tif", "sub/c.png", "sub/deep/d.gif"]
    inside = [str(images / name) for name in names]
    found, left_out = image_paths([images])
    assert found == inside and left_out == [f"{images}: 1 x named .md (notes.md)"]
    listed = images.parent / "list.txt"
    listed.write_bytes(b"\xef\xbb\xbf" + f"{images.name}/a.png\r\n\n/no/b.png\n".encode())
    start = str(images.parent)
    found = image_paths([inside[2], listed, images / "notes.md", inside[2]]).paths
    assert found == [inside[2], f"{start}/{images.name}/a.png", "/no/b.png",
                     str(images / "notes.md"), inside[2]]  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x.png\ny z.png")))
    assert image_paths(["-"]).paths == ["x.png", "y z.png"]


def test_images_of_every_kind_are_classified(run, images, capsys):
    said = printed(capsys, "predict", run, images)
    assert [line.split("  ")[0].strip() for line in said.splitlines()] == [
        str(images / name) for name in ("a.png", "b.tif", "sub/c.png", "sub/deep/d.gif")
    ]
    assert all("class" in line and "exit " in line and "%" in line for line in said.splitlines())


def test_photos_are_turned_as_in_training(model, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    plain, turned = Image.fromarray(pixels), Image.fromarray(np.rot90(pixels).copy())
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    plain.save(tmp_path / "a.png")
    turned.save(tmp_path / "b.png", exif=exif)
    a, b = predict(model, [tmp_path / "a.png", tmp_path / "b.png"])
    assert a.confidence == b.confidence
    assert model.transform.exif_orientation


def test_unreadable_images_are_named_and_counted(run, images, tmp_path, capsys, model):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    small = tmp_path / "small.png"
    Image.new("RGB", (4, 4)).save(small)
    good = images / "a.png"
    assert cli.main([str(a) for a in ("predict", run, bad, good, small, good)]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert f"left out: {bad}: cannot be read as an image" in err
    assert f"left out: {small}: expected an image of 16x16 pixels, got 4x4" in err
    assert "images: 2, cannot be read: 2; left at each exit, %: " in err
    assert cli.main([str(a) for a in ("predict", run, bad)]) == 2
    assert "expected images that can be read, got 1 that cannot" in capsys.readouterr().err
    with pytest.raises(DecodeError, match="bad.jpg"):
        list(predict(model, [good, bad]))


def test_csv_is_complete_or_not_there(run, images, tmp_path, capsys, monkeypatch):
    table = tmp_path / "out.csv"
    printed(capsys, "predict", run, images, "--csv", table, "--top-k", 2, "--exit-probabilities")
    rows = list(csv.DictReader(table.open(newline="")))
    assert [row["path"] for row in rows] == image_paths([images]).paths
    assert list(rows[0]) == [
        "path", "class", "class_index", "confidence", "exit_index", "top2_class",
        "top2_probability", "exit0_class", "exit0_probability", "exit1_class",
        "exit1_probability", "exit2_class", "exit2_probability",
    ]  # fmt: skip
    assert float(rows[0]["confidence"]) >= float(rows[0]["top2_probability"])
    before = table.read_bytes()
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"")
    assert cli.main(["predict", str(run), str(bad), "--csv", str(table)]) == 2
    assert table.read_bytes() == before and not list(tmp_path.glob("*.partial"))
    assert capsys.readouterr().out == ""


def test_it_says_by_what_images_leave(run, images, tmp_path, capsys):
    assert cli.main(["predict", str(run), str(images / "a.png")]) == 0
    assert "exits by policy.json: confidence " in capsys.readouterr().err
    shutil.copy(run / "model.safetensors", tmp_path / "alone.safetensors")
    assert cli.main(["predict", str(tmp_path / "alone.safetensors"), str(images / "a.png")]) == 0
    assert "exits by the thresholds in the weights: confidence " in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("RUN", "nowhere.png"), "nowhere.png: expected an image, a folder or a list, found none"),
        (("RUN", "a\0b"), "FILE|FOLDER|LIST: expected a path without NUL"),
        (("nowhere", "IMAGE"), "nowhere: expected a folder or a file of weights, found none"),
        (("RUN", "IMAGE", "--top-k", "0"), "--top-k: expected an integer of 1 to"),
        (("RUN", "IMAGE", "--batch", "0"), "--batch: expected an integer of 1 to"),
        (("RUN", "IMAGE", "--workers", "-1"), "--workers: expected an integer of 0 to"),
        (("RUN", "IMAGE", "--csv", "no/folder.csv"), "--csv: expected a file in a folder that ex"),
        (("RUN", "IMAGE", "--device", "gpu"), "device: expected cpu, cuda"),
        (("RUN", "EMPTY"), "expected images, got an empty folder; the extensions"),
        (("RUN", "LIST"), "expected one path per line, got no line"),
    ],
)
def test_wrong_calls(arguments, message, run, images, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").write_text("\n \n")
    places = {"RUN": run, "IMAGE": images / "a.png", "EMPTY": tmp_path / "empty",
              "LIST": tmp_path / "list.txt"}  # fmt: skip
    assert message in refused(capsys, "predict", *(places.get(a, a) for a in arguments))


def test_wrong_calls_in_python(model, images, tmp_path):
    for options, message in (
        ({"batch_size": 0}, "batch_size: expected"),
        ({"workers": -1}, "workers: expected"),
        ({"top_k": 0}, "top_k: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            predict(model, [images / "a.png"], **options)
    for paths in ("a.png", [3], None):
        with pytest.raises(TypeError, match="paths: expected"):
            predict(model, paths)
    with pytest.raises(TypeError, match="model: expected an elf_fast.ELF"):
        predict(torch.nn.Identity(), [])
    bare = elf_fast.ELF([torch.nn.Identity()], [torch.nn.Identity()])
    with pytest.raises(ValueError, match="model: expected one with transform"):
        predict(bare, [])
    assert list(predict(model, [])) == []
    with pytest.raises(DataError, match="found none"):
        image_paths([tmp_path / "none.png"])


def test_bench_times_a_run_with_its_measured_shares(run, tmp_path, capsys):
    for file in ("model.safetensors", "config.json"):
        shutil.copy(run / file, tmp_path / file)
    command = ("--batch", "20", "--seconds", "0", "--json")
    policy = Policy.load(run / "policy.json")
    metrics = json.loads((run / "metrics.json").read_text())["test"]
    (tmp_path / "metrics.json").write_text(json.dumps({"test": metrics}))
    for folder, left, source in (
        (run, [each.share.value for each in policy.measured.exits], "calibration data"),
        (tmp_path, metrics["exit_shares"], "test (metrics.json)"),
    ):
        assert cli.main(["bench", str(folder), *command]) == 0
        out, err = capsys.readouterr()
        assert f"images leave as measured on {source}" in err
        (row,) = json.loads(out)
        first, second = row["share"]
        assert first == pytest.approx(1 - left[0])
        assert second == pytest.approx(left[2] / (left[1] + left[2]) if first else 1.0)
    (tmp_path / "metrics.json").unlink()
    assert cli.main(["bench", str(tmp_path), *command]) == 0
    out, err = capsys.readouterr()
    assert "nothing was measured of this run" in err
    assert [row["share"] for row in json.loads(out)] == [0.5, 0.8, 1.0]
    for flag, value in (("--model", "resnet18"), ("--size", "9"), ("--classes", "3")):
        said = refused(capsys, "bench", run, flag, value)
        assert f"{flag}: expected none with a run, which has its own, got {value}" in said
    (tmp_path / "metrics.json").write_text('{"test": {"exit_shares": [1.0]}}')
    assert "exit_shares: expected 3 shares, got [1.0]" in refused(capsys, "bench", tmp_path)
