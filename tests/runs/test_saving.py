"""`elf_fast.save`: what it writes, that `load` gives the same network, and the Hub's layout."""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, hf_hub_download
from test_loading import a_policy
from torch import nn

import elf_fast
from elf_fast import losses
from elf_fast.backbones import create
from elf_fast.classifiers import use_cosine_
from elf_fast.data import Preprocessing
from elf_fast.runs import card, files
from elf_fast.runs.files import CheckpointError
from elf_fast.runs.lock import Lock

NAMES = ["cat", "dog", "owl | *not* a <b>hawk</b>", "fox"]
TRANSFORM = Preprocessing(32, "squash")
IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def network(name: str = "cifar_resnet8", exits=("layer1", "layer2"), **options) -> elf_fast.ELF:
    """An untrained network; from_backbone makes the plain one once."""
    if (name, options) == ("cifar_resnet8", {}):
        return copy.deepcopy(_plain())
    return _made(name, exits, **options)


@functools.cache
def _plain() -> elf_fast.ELF:
    return _made("cifar_resnet8", ("layer1", "layer2"))


def _made(name: str, exits, **options) -> elf_fast.ELF:
    torch.manual_seed(0)
    made = create(name, 4)
    return elf_fast.from_backbone(made, list(exits), 4, example_input=IMAGES[:2], **options).eval()


def own(act: type[nn.Module] = nn.ReLU) -> elf_fast.ELF:
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Conv2d(3 if e == 0 else 8, 8, 3), act()) for e in range(3)]
    return elf_fast.ELF(stages, [elf_fast.ExitHead(8, 4) for _ in stages]).eval()


def check_same(one: elf_fast.ELF, other: elf_fast.ELF) -> None:
    with torch.inference_mode():
        a, b = one(IMAGES), other(IMAGES)
    torch.testing.assert_close(a.logits, b.logits)
    assert torch.equal(a.exit_index, b.exit_index)
    assert torch.equal(one.thresholds, other.thresholds)


@pytest.mark.parametrize(
    "name, exits, options",
    [
        ("cifar_resnet14", ("layer1", "layer2"), {"thresholds": [[0.3, 0.4, 0.2, 0.5]] * 2,
         "exit_loss": losses.BalancedSoftmaxLoss([9, 5, 3, 1]), "train_thresholds": 0.7}),
        ("timm/resnet10t", ("layer2",), {"criterion": "entropy", "thresholds": 0.9, "conv": True}),
        ("torchvision/mobilenet_v3_small", ("features.3",), {"exit_loss": nn.functional.nll_loss}),
    ],
)  # fmt: skip
def test_a_network_of_from_backbone_is_described_by_its_name(tmp_path, name, exits, options):
    model = network(name, exits, **options)
    elf_fast.save(model, tmp_path / "a", class_names=NAMES, class_counts=[9, 5, 3, 1],
                  transform=TRANSFORM)  # fmt: skip
    made = elf_fast.load(tmp_path / "a")
    check_same(made, model)
    assert made.criterion == model.criterion
    assert made.origin["backbone"] == {"name": name, "options": {}}
    assert made.class_names == tuple(NAMES) and made.class_counts == (9, 5, 3, 1)
    assert made.transform == TRANSFORM
    if "train_thresholds" in options:
        assert torch.equal(made.train_thresholds, model.train_thresholds)
        assert torch.equal(made.exit_loss.bias, model.exit_loss.bias)
    elf_fast.save(made, tmp_path / "b")  # all it needs it has
    check_same(elf_fast.load(tmp_path / "b"), model)


def test_a_network_with_cosine_classifiers_in_bfloat16(tmp_path):
    model = network(temperatures=1 / 30, exit_loss=losses.LDAMLoss([9, 5, 3, 1]))
    use_cosine_(model)
    elf_fast.save(model.bfloat16(), tmp_path, class_names=NAMES)
    made = elf_fast.load(tmp_path)
    assert made.exit_loss.scale == 30.0 and made.transform is None
    assert next(made.parameters()).dtype == torch.bfloat16
    with torch.inference_mode():
        assert torch.equal(made(IMAGES.bfloat16()).logits, model(IMAGES.bfloat16()).logits)


def test_a_changed_network_is_not_described_by_the_old_name(tmp_path):
    model = network()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1.0  # the same tensors, other logits
    with pytest.raises(ValueError, match="cifar_resnet8.*logits at exit 0 differ"):
        elf_fast.save(model, tmp_path, class_names=NAMES, backbone="cifar_resnet8")
    assert not list(tmp_path.iterdir())
    with pytest.warns(UserWarning, match="logits at exit 0 differ.*load.folder, model="):
        elf_fast.save(model, tmp_path, class_names=NAMES)
    check_same(elf_fast.load(tmp_path, model=network()), network())


def test_a_network_of_own_code_is_loaded_into_one(tmp_path):
    model = own()
    with pytest.warns(UserWarning, match="none of timm's or torchvision's by name"):
        elf_fast.save(model, tmp_path, class_names=NAMES, transform=TRANSFORM)
    with pytest.raises(CheckpointError, match=r"own code.*elf_fast.load\(path, model=model\)"):
        elf_fast.load(tmp_path)
    fresh = own()
    nn.init.zeros_(fresh.stages[0][0].weight)
    fresh.exit_loss = losses.BalancedSoftmaxLoss([9, 5, 3, 1])  # has a tensor that no file has
    made = elf_fast.load(tmp_path, model=fresh)
    assert made is fresh and made.class_names == tuple(NAMES)
    check_same(made, model)
    with pytest.raises(CheckpointError, match="weights do not fit"):
        elf_fast.load(tmp_path, model=network())
    assert "model=model" in (tmp_path / "README.md").read_text()


def test_a_loaded_run_is_saved_without_the_places_of_its_machine(digits_run, tmp_path):
    model = elf_fast.load(digits_run[0])
    elf_fast.save(model, tmp_path, results=digits_run[1])
    made = elf_fast.load(tmp_path)
    images = torch.randn(6, 3, 16, 16)
    assert torch.equal(made(images).logits, model(images).logits)
    settings = json.loads((tmp_path / "config.json").read_text())["config"]
    assert settings["model"] == "cifar_resnet8" and "output" not in settings
    assert str(digits_run[0].parent) not in (tmp_path / "config.json").read_text()
    model.criterion, model.thresholds = "margin", 0.25
    elf_fast.save(model, tmp_path)
    made = elf_fast.load(tmp_path)
    assert made.criterion == "margin" and made.thresholds.tolist() == [0.25, 0.25]


def test_a_policy_goes_with_its_weights(digits_run, tmp_path):
    model = elf_fast.load(digits_run[0])
    elf_fast.save(model, tmp_path, policy=a_policy(model))
    made = elf_fast.load(tmp_path)
    assert made.policy == a_policy(model)
    elf_fast.save(made, tmp_path / "again")
    assert elf_fast.load(tmp_path / "again").policy == made.policy
    made.thresholds = 0.5  # no longer those of the policy
    elf_fast.save(made, tmp_path / "changed")
    assert elf_fast.load(tmp_path / "changed").thresholds.tolist() == [0.5, 0.5]
    with torch.no_grad():
        next(made.parameters()).add_(1.0)
    elf_fast.save(made, tmp_path)  # over the folder with a policy for other weights
    assert elf_fast.load(tmp_path).policy is None
    assert (tmp_path / "policy.previous.json").exists()
    with pytest.raises(ValueError, match="policy: expected one for these weights"):
        elf_fast.save(made, tmp_path, policy=a_policy(model))


def test_a_readme_of_the_users_stays(tmp_path):
    model = network()

    def save(names: list[str]) -> str:
        elf_fast.save(model, tmp_path, class_names=names)
        return (tmp_path / "README.md").read_text()

    assert "| cat |" in save(NAMES)
    assert "| ape |" in save(["ape", *NAMES[1:]])  # nobody edited the card
    (tmp_path / "README.md").write_text(save(NAMES).replace("image classifier", "owl classifier"))
    assert "owl classifier" in save(["ape", *NAMES[1:]])
    (tmp_path / "README.md").write_text("# Mine\n")
    assert save(NAMES) == "# Mine\n"


def test_the_files_before_are_kept_and_a_crash_in_between_leaves_a_good_folder(
    tmp_path, monkeypatch
):
    model = network()
    elf_fast.save(model, tmp_path, class_names=NAMES)
    content = (tmp_path / "model.safetensors").read_bytes()
    model.thresholds = 0.123
    wrote = files.write

    def full(path: Path, data: bytes) -> None:
        if path.name == "config.json":
            raise OSError(28, "No space left on device", str(path))
        wrote(path, data)

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(OSError, match="No space left"):
        elf_fast.save(model, tmp_path, class_names=["ape", *NAMES[1:]])
    monkeypatch.undo()
    made = elf_fast.load(tmp_path)
    assert made.class_names[0] == "ape" and made.thresholds.tolist() == pytest.approx([0.123] * 2)
    assert (tmp_path / "model.previous.safetensors").read_bytes() == content
    assert not list(tmp_path.glob("*.partial")) and not (tmp_path / "run.lock").exists()


def test_a_folder_in_which_a_run_writes_is_refused(tmp_path):
    with Lock(tmp_path), pytest.raises(FileExistsError, match="in use by a run"):
        elf_fast.save(network(), tmp_path, class_names=NAMES)
    assert not list(tmp_path.iterdir())


# The Hub


def test_the_card_is_one_that_the_hub_reads(digits_run, tmp_path):
    model, results = elf_fast.load(digits_run[0]), digits_run[1]
    for folder in (digits_run[0], tmp_path / "saved"):
        if folder != digits_run[0]:
            elf_fast.save(model, folder, results=results)
        read = ModelCard.load(folder / "README.md")
        data = read.data.to_dict()
        assert data["library_name"] == "elf_fast" and "license" not in data
        assert data["pipeline_tag"] == "image-classification" and "long-tailed" in data["tags"]
        found = {each.metric_name: each for each in read.data.eval_results}
        assert found["accuracy"].metric_value == results["test"]["overall"]
        assert found["accuracy"].dataset_split == "test"
        assert found["accuracy"].dataset_name == "digits"
        share = found["FLOPs as a share of those without exits"].metric_value
        assert share == results["test"]["flops_share"]
        shown = f"{results['test']['exit_shares'][0]:.1%}"
        assert shown in read.text and "cifar\\_resnet8" in read.text


def test_the_card_shows_names_as_they_are(tmp_path):
    elf_fast.save(network(), tmp_path, class_names=NAMES, class_counts=[200, 50, 9, 0])
    read = ModelCard.load(tmp_path / "README.md")
    assert r"| 2 | owl \| \*not\* a \<b\>hawk\</b\> | 9 |" in read.text
    assert read.data.eval_results is None
    assert "FLOPs" in read.text and "takes the rest" in read.text


def test_a_snapshot_of_the_hub_opens(tmp_path):
    """The cache holds files by their digest, and a snapshot is a folder of links to them."""
    model = network()
    elf_fast.save(model, tmp_path / "mine", class_names=NAMES, transform=TRANSFORM)
    commit, repository = "a" * 40, tmp_path / "cache" / "models--ann--birds"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for i, file in enumerate(sorted((tmp_path / "mine").iterdir())):
        shutil.copy(file, repository / "blobs" / f"{i:040}")
        os.symlink(f"../../blobs/{i:040}", snapshot / file.name)
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    found = hf_hub_download("ann/birds", "model.safetensors", **options)
    check_same(elf_fast.load(found), model)
    check_same(elf_fast.load(Path(found).parent), model)
    elf_fast.save(model, snapshot, class_names=NAMES)  # replaces links, not what they lead to
    assert (repository / "blobs" / f"{2:040}").read_bytes() == (
        tmp_path / "mine" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"class_names": None}, ValueError, "class_names: expected 4, one per class, got 0"),
        ({"class_names": "abcd"}, TypeError, "class_names: expected a list of texts"),
        ({"class_names": [1, 2, 3, 4]}, TypeError, "class_names: expected a list of texts"),
        ({"class_names": ["a", "b", "a", "c"]}, ValueError, "every name once, got 'a' again"),
        ({"class_names": ["a"]}, ValueError, "class_names: expected 4, one per class, got 1"),
        ({"class_counts": [1, 2]}, ValueError, "class_counts: expected 4, one per class, got 2"),
        ({"class_counts": [1, 2, 3, -1]}, ValueError, "class_counts: expected"),
        ({"transform": nn.Identity()}, TypeError, "transform: expected a data.Preprocessing"),
        ({"transform": {"size": 3}}, TypeError, "config: expected what timm.data.resolve"),
        ({"results": 3}, TypeError, "results: expected a dict of metrics"),
        ({"results": {"a": 1}}, ValueError, "results: expected metrics with the entry overall"),
        ({"policy": 3}, TypeError, "policy: expected a Policy"),
        ({"backbone": 3}, TypeError, "backbone: expected a name or None"),
        ({"backbone": "resnet_18x"}, ValueError, "backbone: expected the name of the model's net"),
        ({"backbone": "cifar_resnet14"}, ValueError, "got 'cifar_resnet14'.* missing"),
    ],
)
def test_wrong_calls(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        elf_fast.save(network(), tmp_path / "a", **{"class_names": NAMES, **options})
    assert not (tmp_path / "a").exists()


def test_wrong_places_and_models(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="folder: expected a folder, got the file"):
        elf_fast.save(network(), tmp_path / "file", class_names=NAMES)
    with pytest.raises(TypeError, match="folder: expected a folder, got 3"):
        elf_fast.save(network(), 3, class_names=NAMES)
    with pytest.raises(TypeError, match="model: expected an elf_fast.ELF"):
        elf_fast.save(create("cifar_resnet8", 4), tmp_path, class_names=NAMES)
    with pytest.raises(ValueError, match="backbone: expected None for an ELF that from_backbone"):
        elf_fast.save(own(), tmp_path, class_names=NAMES, backbone="cifar_resnet8")


def test_a_card_from_results_on_validation():
    part, metrics = card.main_results({"validation": {"overall": 0.5}, "history": []})
    assert part == "validation" and metrics == {"overall": 0.5}
