"""The weights that a run starts from."""

from __future__ import annotations

import urllib.error
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_cases import DIGITS
from torch import nn

from elf_fast import backbones
from elf_fast.runs import initial
from elf_fast.runs.config import TrainConfig
from elf_fast.runs.networks import backbone_name, network

safetensors = pytest.importorskip("safetensors.torch")

PLAIN = replace(DIGITS, exits=())


def weights(classes: int = 10, seed: int = 7) -> dict[str, torch.Tensor]:
    """Of a cifar_resnet8, every tensor different from its initial value."""
    torch.manual_seed(seed)
    state = backbones.create("cifar_resnet8", classes).state_dict()
    return {k: v + 1 if v.dtype == torch.int64 else torch.randn_like(v) for k, v in state.items()}


def inner(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of an ELF by the backbone's names."""
    return {n: v for k, v in model.state_dict().items() if (n := backbone_name(k)) is not None}


def start(config: TrainConfig, classes: int = 10) -> tuple[nn.Module, initial.Loaded]:
    model = network(config, [9] * classes)
    loaded = initial.load_(model, config)
    assert loaded is not None
    return model, loaded


def saved(content: object, folder: Path, name: str = "a.pth") -> str:
    torch.save(content, folder / name)
    return str(folder / name)


@pytest.mark.parametrize("config", [PLAIN, DIGITS], ids=["plain", "exits"])
@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: state,
        lambda state: {"epoch": 3, "state_dict": state},
        lambda state: {"model": {f"module.{k}": v for k, v in state.items()}},
        lambda state: {"model_state_dict": {f"_orig_mod.{k}": v for k, v in state.items()}},
        lambda state: {"state_dict": weights(seed=8), "state_dict_ema": state},
    ],
)
def test_files_of_training_scripts_are_loaded(wrapped, config, tmp_path):
    state = weights()
    path = saved(wrapped(state), tmp_path)
    model, loaded = start(replace(config, init_from=path))
    assert loaded.matched and not (loaded.missing or loaded.unexpected or loaded.other_shape)
    found = inner(model)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_a_safetensors_file_is_loaded(tmp_path):
    state = weights()
    safetensors.save_file(state, tmp_path / "a.safetensors")
    model, _ = start(replace(PLAIN, init_from=str(tmp_path / "a.safetensors")))
    assert torch.equal(inner(model)["conv1.weight"], state["conv1.weight"])


def test_a_classifier_for_other_classes_stays_as_it_was_and_is_named(tmp_path):
    state = {**weights(classes=7), "extra.weight": torch.zeros(2)}
    del state["bn1.bias"]
    untrained = inner(network(PLAIN, [9] * 10))
    model, loaded = start(replace(PLAIN, init_from=saved(state, tmp_path)))
    assert torch.equal(inner(model)["fc.weight"], untrained["fc.weight"])
    assert loaded.other_shape == ["fc.weight [7, 64] for [10, 64]", "fc.bias [7] for [10]"]
    assert loaded.missing == ["bn1.bias"] and loaded.unexpected == ["extra.weight"]
    assert "41 of 44 tensors; of another shape, left at initial values (2): fc.w" in str(loaded)


@pytest.mark.parametrize("was, now", [(DIGITS, PLAIN), (PLAIN, DIGITS), (DIGITS, DIGITS)])
def test_a_run_with_exits_starts_one_without_and_back(was, now, tmp_path):
    trained = network(replace(was, seed=5), [9] * 10)
    path = saved(trained.state_dict(), tmp_path)
    model, loaded = start(replace(now, init_from=path))
    assert not loaded.missing
    ours, theirs = inner(model), inner(trained)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    if was is now:  # heads belong to places in the network
        assert torch.equal(model.heads[0].classifier.weight, trained.heads[0].classifier.weight)


def test_heads_of_other_places_are_not_loaded(tmp_path):
    deeper = replace(DIGITS, model="cifar_resnet14", exits=("layer1.1",), seed=5)
    trained = network(deeper, [9] * 10)  # a head of the same shape, one block further
    path = saved(trained.state_dict(), tmp_path)
    config = replace(deeper, exits=("layer1.0",), seed=0, init_from=path)
    untrained = network(config, [9] * 10).heads[0].classifier.weight
    assert torch.equal(start(config)[0].heads[0].classifier.weight, untrained)


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("the file ran code",))


@pytest.mark.parametrize(
    "content, message",
    [
        ({"a.weight": torch.zeros(2)}, "at least half of the 23 parameters of cifar_resnet8 in .*"
         " got 0; it has a.weight, the network bn1.bias"),
        ({k: v for k, v in weights().items() if "conv" in k}, "at least half of the 23 .* got 7;"),
        ({**weights(), "bn1.bias": torch.full((16,), torch.nan)},
         "expected finite weights, got NaN, .* in bn1.bias"),
        ({"a": Code()}, "expected a file of tensors, .* holds more than tensors, which is not"),
        ({"epoch": 3}, "init_from: expected tensors by name in .*, got none"),
        ([torch.zeros(2)], "init_from: expected a state_dict in .*, got a list"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        start(replace(PLAIN, init_from=saved(content, tmp_path)))


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_damaged_files_are_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"no weights")
    with pytest.raises(ValueError, match=f"^init_from: expected a .*{name}"):
        start(replace(PLAIN, init_from=str(tmp_path / name)))
    with pytest.raises(ValueError, match="^init_from: expected a file or the folder of a run, got"):
        start(replace(PLAIN, init_from=str(tmp_path / "none")))


def test_position_embeddings_of_another_size_are_refused(tmp_path):
    pytest.importorskip("timm")
    options = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}
    name = "timm/vit_tiny_patch16_224"
    config = TrainConfig(
        data_dir="a", img_size=64, model=name, exits=(), model_kwargs={**options, "img_size": 64}
    )
    state = backbones.create(name, 10, **options).state_dict()
    with pytest.raises(ValueError, match=r"position embeddings .* pos_embed \[1, 5, 24\] for \[1"):
        start(replace(config, init_from=saved(state, tmp_path)))


def test_pretrained_weights_of_torchvision_keep_the_new_classifier(tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    name = "torchvision/shufflenet_v2_x0_5"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    state = backbones.create(name, 1000).state_dict()
    saved(state, tmp_path / "hub/checkpoints", "shufflenetv2_x0.5-f707e7126e.pth")
    config = TrainConfig(data_dir="a", img_size=32, model=name, exits=(), pretrained=True)
    model, loaded = start(config)
    assert loaded.other_shape == [
        "fc.weight [1000, 1024] for [10, 1024]",
        "fc.bias [1000] for [10]",
    ]
    assert not loaded.missing and not loaded.unexpected
    assert torch.equal(inner(model)["conv5.0.weight"], state["conv5.0.weight"])


def test_pretrained_weights_of_timm_are_loaded(tmp_path):
    pytest.importorskip("timm")
    name = "timm/test_resnet"
    state = backbones.create(name, 1000).state_dict()
    path = saved(state, tmp_path)
    config = TrainConfig(
        data_dir="a", img_size=32, model=name, exits=(), pretrained=True,
        model_kwargs={"pretrained_cfg_overlay": {"file": path, "hf_hub_id": None, "url": None}},
    )  # fmt: skip
    model, loaded = start(config)
    assert len(loaded.other_shape) == 2 and not loaded.missing
    assert torch.equal(inner(model)["conv1.0.weight"], state["conv1.0.weight"])


def test_a_download_that_fails_is_one_sentence(monkeypatch):
    pytest.importorskip("torchvision")

    def unreachable(*arguments: object, **options: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    config = replace(PLAIN, pretrained=True, model="torchvision/shufflenet_v2_x0_5")
    with pytest.raises(ValueError, match="^pretrained: expected weights of .* no network") as error:
        initial.load_(network(config, [9] * 10), config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, mean, interpolation",
    [
        ("timm/tf_efficientnet_lite0", 0.5, "bicubic"),
        ("torchvision/resnet18", 0.485, "bilinear"),
        ("torchvision/vit_b_16", 0.485, "bilinear"),
    ],
)
def test_published_statistics(name, mean, interpolation):
    pytest.importorskip(name.split("/")[0])
    found = backbones.statistics(name)
    assert found.mean[0] == mean and found.interpolation == interpolation


@pytest.mark.parametrize("name", ["cifar_resnet8", "timm/resnet18_not_there", "timm/test_vit4"])
def test_a_network_without_published_weights_is_named(name):
    pytest.importorskip("timm")
    config = replace(PLAIN, pretrained=True, model=name)
    with pytest.raises(ValueError, match=f"^pretrained: expected a network .*{name}"):
        initial.pretrained_statistics(config)
