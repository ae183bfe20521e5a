"""BatchNorm over few samples: in evaluation without running statistics, and in training when images
of a batch cannot be read."""

from __future__ import annotations

import pickle

import pytest
import torch
from run_cases import QUIET, coloured_images
from torch import nn

from elf_fast import ELF, ExitHead, fuse, reference
from elf_fast.modes import mode
from elf_fast.runs.config import TrainConfig
from elf_fast.training.trainer import train

BOTH = pytest.mark.parametrize("cls", [reference.ELF, ELF], ids=["reference", "elf_fast"])


def elf(cls, norm, place="stage", **options):
    torch.manual_seed(0)
    last = nn.Sequential(nn.Linear(6, 6), norm) if place == "stage" else nn.Linear(6, 6)
    head = nn.Sequential(norm, nn.Linear(6, 4)) if place == "head" else ExitHead(6, 4)
    model = cls([nn.Linear(5, 6), last], [ExitHead(6, 4), head], **options)
    with torch.no_grad():
        model.heads[0].classifier.weight *= 4
    return model


def split_at(model, x, leaving):
    """Sets the threshold at which `leaving` samples leave at the first exit."""
    with torch.no_grad():
        sure = model.heads[0](model.stages[0](x)).softmax(1).amax(1).sort(descending=True).values
    model.thresholds = float((sure[leaving - 1] + sure[leaving]) / 2)


@BOTH
@pytest.mark.parametrize("leaving", [3, 9])
@pytest.mark.parametrize("place", ["stage", "head"])
@pytest.mark.parametrize("drop_exited", [None, True])
@pytest.mark.parametrize("through", ["eval", "mode"])
def test_evaluation_by_batch_statistics_is_that_of_all_rows(
    cls, leaving, place, drop_exited, through
):
    """Also for a lone survivor, which has no statistics of its own."""
    norm = nn.BatchNorm1d(6, track_running_stats=False)
    model = elf(cls, norm, place, drop_exited=drop_exited)
    x = torch.randn(10, 5, generator=torch.Generator().manual_seed(7))
    split_at(model, x, leaving)
    with torch.no_grad(), mode(model, training=False):
        if through == "eval":
            model.eval()
        out = model(x, torch.zeros(10, dtype=torch.int64))
        rows = model.heads[1](model.stages[1](model.stages[0](x)))
    late = out.exit_index == 1
    assert late.sum() == 10 - leaving
    torch.testing.assert_close(out.logits[late], rows[late])


@BOTH
def test_a_norm_that_loses_its_running_statistics_is_seen(cls):
    norm = nn.BatchNorm1d(6)
    model = elf(cls, norm).eval()
    assert model.drops_exited
    norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    assert not nn.Sequential(model).eval()[0].drops_exited
    assert not pickle.loads(pickle.dumps(model)).drops_exited
    if cls is reference.ELF:
        assert not fuse(model).drops_exited


@pytest.fixture
def broken(tmp_path):
    """A run on images of 4 x 4, whose last feature map is 1 x 1; some cannot be read."""
    root = coloured_images(tmp_path / "data", {"train": (20, 20), "test": (2, 2)})
    files = sorted((root / "train").rglob("*.png"))
    unreadable = files[::5] + files[1::5]
    for path in unreadable:
        path.write_bytes(b"no image")
    config = TrainConfig(
        data_dir=str(root), model="cifar_resnet8", epochs=1, batch_size=4, workers=0, img_size=4,
        warmup_epochs=0.0, lr=0.02, log_tensorboard=False, skip_errors=True,
        output=str(tmp_path / "run"), device="cpu",
    )  # fmt: skip
    return config, len(unreadable)


@pytest.mark.parametrize("norms", [True, False])
def test_a_lone_readable_image_is_left_out_if_it_cannot_be_normalised(broken, norms, monkeypatch):
    from elf_fast.training.trainer import Trainer

    config, unreadable = broken
    sizes, step = [], Trainer.step

    def observed(self, group):
        if not norms:
            for part in (self.model.stages, self.model.heads):
                part.eval()
        sizes.extend(len(targets) for _, targets in group)
        return step(self, group)

    if not norms:
        monkeypatch.setattr(Trainer, "_needs_two", lambda trainer: False)
    monkeypatch.setattr(Trainer, "step", observed)
    epoch = train(config, console=QUIET)["history"][0]
    assert 1 in sizes and sum(sizes) == 40 - unreadable
    assert epoch["skipped"] == unreadable + (sizes.count(1) if norms else 0)
