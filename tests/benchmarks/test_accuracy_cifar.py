"""The runs on CIFAR-10-LT, through the trainer, on two classes of one image."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("torchmetrics")

from PIL import Image

from benchmarks.accuracy import cifar, results, run
from elf_fast.demo import run as demo


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with demo.one_thread():
        yield


def test_cifar_runs_go_through_the_trainer(tmp_path, monkeypatch, capsys):
    pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy()
    for part, count in (("train", 20), ("test", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for k in range(count):
                Image.fromarray(pixels).save(folder / f"{k}.png")
    monkeypatch.setattr(
        cifar, "SETTINGS", [*cifar.SETTINGS, "--no-amp", "--model", "cifar_resnet8"]
    )
    monkeypatch.setattr(cifar, "EPOCHS", {10: 1})
    output = tmp_path / "results.jsonl"
    command = ["--only", "imbalance=10", "--only", "loss=ce", "--only", "seed=1"]
    command += ["--cifar10", str(tmp_path / "images"), "--work", str(tmp_path / "work")]
    command += ["--output", str(output)]
    run.main(command)
    records = {r.variant: record for r, record in results.load(output).items()}
    assert {name: list(r["test"]) for name, r in records.items()} == {
        "plain": ["full"], "keep": ["chosen", "best"],
    }  # fmt: skip
    assert all(r["class_counts"] == [18, 1] for r in records.values())
    assert all(r["settings"]["seed"] == 1 for r in records.values())
    assert records["keep"]["test"]["best"]["flops_share"] <= 0.8
    output.unlink()
    run.main(command)  # it reads what has been trained
    assert {r.variant: record for r, record in results.load(output).items()} == records
    with pytest.raises(SystemExit):
        run.main(["--work", str(tmp_path)])
    assert "--cifar10, --work: expected both or neither" in capsys.readouterr().err
