"""What a user can put right is one line that names the setting, the flag or the file."""

from __future__ import annotations

import math
import os
import socket
import time
from dataclasses import replace
from urllib.error import URLError

import pytest
import torch
from run_cases import DIGITS, QUIET, refused

pytest.importorskip("safetensors")
pytest.importorskip("yaml")

import safetensors

from elf_fast import ELF, checks, cli, criteria, from_backbone, functional
from elf_fast.backbones import CifarResNet
from elf_fast.cli import doctor
from elf_fast.runs import checkpoints, contents, files, networks, opening, plain, strict_yaml
from elf_fast.runs.files import CheckpointError
from elf_fast.training import resume
from elf_fast.training.processes import Processes, joined
from elf_fast.training.trainer import Trainer

CPU = Processes(torch.device("cpu"))
TRAIN = "train --dataset digits --model cifar_resnet8 --workers 0 --no-log-tensorboard".split()


@pytest.fixture(autouse=True)
def _one_thread(one_thread) -> None:
    """For every test of this file."""


# Devices and sizes


@pytest.mark.parametrize("name", ["meta", "mps", "xla", "xpu:1", "privateuseone", "cpu:x", "a\0b"])
def test_a_device_that_cannot_compute_here_is_named(name):
    with pytest.raises(ValueError, match=r"^device: expected cpu"):
        checks.device(name)
    assert checks.device("cpu:3") == torch.device("cpu")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([*TRAIN, "--device", "meta"], "--device: expected cpu"),
        ([*TRAIN, "--batch-size", 10**12], "--batch-size: expected an integer of at most 21"),
        ([*TRAIN, "--val-interval", 10**11], "--val-interval: expected an integer of at most"),
        (["train", "--data-dir", ".", "--img-size", 10**8], "--img-size: expected an integer in"),
        (["bench", "--size", 10**8], "--size: expected an integer in [1, 16384], got 100000000"),
        (["bench", "--batch", 10**12], "--batch: expected an integer in [1, 1048576]"),
        (["bench", "--seconds", "nan"], "--seconds: expected a number in [0.0, 86400.0], got nan"),
        (["bench", "--model", "resnet51"], "--model: expected a network of timm"),
        (["train", "-c", "a\0b"], "--config: expected a path without NUL"),
        (["train", "--resume", "a\0"], "--resume: expected a path without NUL"),
        ([*TRAIN, "--output", "a\0"], "--output: expected UTF-8 text without NUL"),
        (["eval", "\0"], "RUN: expected a path without NUL"),
        (["eval", "a\x1b[2J"], "a\\x1b[2J: expected a checkpoint file, found none"),
        (["eval", "a", "--data-dir", "\0"], "--data-dir: expected a path without NUL"),
        (["demo", "--output", "\0"], "--output: expected a path without NUL"),
    ],
)
def test_commands_refuse_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, *arguments).startswith(f"elf-fast: {message}")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def own_count(monkeypatch) -> None:
    """torch also counts groups that failed, and its processes must agree on the count."""
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_group_count", 0)


@pytest.mark.parametrize(
    "name, value", [("MASTER_PORT", "abc"), ("MASTER_PORT", None), ("RANK", "x"), ("RANK", None)]
)
def test_variables_by_which_no_process_can_join_are_named(
    name, value, own_count, monkeypatch, capsys
):
    given = {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for key, text in {**given, name: value}.items():
        if text is not None:
            monkeypatch.setenv(key, text)
    said = refused(capsys, *TRAIN, "--device", "cpu")
    assert said.startswith("elf-fast: the processes cannot join: ")
    assert "WORLD_SIZE is set, and the variables of torchrun are WORLD_SIZE=1 " in said
    assert f" {name}={value or '(none)'}" in said


def test_a_port_in_use_is_named(own_count, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        given = {"WORLD_SIZE": 1, "RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for key, value in given.items():
            monkeypatch.setenv(key, str(value))
        with pytest.raises(ValueError, match=f"in use.* MASTER_PORT={port}$"), joined("cpu"):
            pass


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nof 1 GiB"),
        MemoryError("array"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("ours"),
    ],
    ids=["cpu", "gpu", "python", "device", "ours"],
)
def test_a_lack_of_memory_is_one_line_and_an_error_of_ours_is_not(error, monkeypatch, capsys):
    def run(arguments: object) -> int:
        raise error

    monkeypatch.setattr(doctor, "run", run)
    if str(error) == "ours":
        with pytest.raises(RuntimeError, match="ours"):
            cli.main(["doctor"])
    else:
        assert "out of memory: smaller batches or images need less" in refused(capsys, "doctor")


# YAML


@pytest.mark.parametrize(
    "content, message",
    [
        ("a: &a [1]\nb: *a", "expected no aliases, got *a"),
        ("epochs: 1\nlr: 2\nepochs: 3", "expected every key once, got epochs again"),
        ("model_kwargs: {a: 1, b: {c: 1, c: 2}}", "expected every key once, got c again"),
        ("<<: [{epochs: 3}, {epochs: 5}]", "expected no merge keys, got <<"),
        ("model_kwargs: {<<: {a: 1}}", "expected no merge keys, got <<"),
        ("batch_size: 0100", "expected a number without colons and leading zeros, got 0100"),
        ("epochs: 1:30", "expected a number without colons and leading zeros, got 1:30"),
        ("lr: 1:30.5", "expected a number without colons and leading zeros, got 1:30.5"),
        ("[" * 2_000, "nested too deeply"),
        ("- " * 9_000, "nested too deeply"),
        ("a: 2020-99-99", "month must be in 1..12"),
        ("a: !!timestamp x", "expected YAML"),
        ("a: !!bool x", "expected YAML"),
        ("a: " + "9" * 5000, "expected YAML"),
        ("a: " + "x" * strict_yaml.LARGEST, "expected YAML of at most 4,194,304 bytes"),
        ("a: 1\n---\nb: 1", "expected a single document"),
    ],
)
def test_yaml_that_says_nothing_clear_is_refused_soon(content, message, tmp_path):
    (tmp_path / "a.yaml").write_text(content)
    start = time.monotonic()
    with pytest.raises(ValueError) as error:
        plain.load_yaml(tmp_path / "a.yaml")
    assert time.monotonic() - start < 10
    assert message in str(error.value) and str(error.value).startswith(f"{tmp_path / 'a.yaml'}: ")


def test_a_billion_of_a_few_lines_is_refused(tmp_path, capsys):
    lines = ["a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 12)]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    assert "expected no aliases, got *a0" in refused(capsys, "train", "-c", tmp_path / "a.yaml")


# Networks


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "torchvision/googlenet", "model_kwargs": {"init_weights": False}},
         "which returns a GoogLeNetOutputs .* in training"),
        ({"model": "timm/test_resnet", "model_kwargs": {"in_chans": 1}}, "1 channels, but got 3"),
        ({"model": "timm/vit_tiny_patch16_224", "model_kwargs": {"depth": 1}},
         "which raises AssertionError: Input height"),
        ({"model": "timm/test_resnet", "model_kwargs": {"features_only": True}}, "returns a list"),
        ({"model": "timm/test_resnet", "model_kwargs": {"num_classes": 0}}, "^model_kwargs: "),
        ({"model": "timm/test_resnet", "model_kwargs": {"act_layer": "a"}}, "^model_kwargs: .*Key"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("exits", [(), None], ids=["no exits", "exits"])
def test_a_network_that_does_not_fit_is_named(changes, message, exits):
    if exits is None and "training" in message:
        return  # with exits there are no auxiliary outputs
    with pytest.raises(ValueError, match=message) as error:
        networks.network(replace(DIGITS, exits=exits, **changes), [9] * 10)
    assert str(error.value).startswith(("model: ", "model_kwargs: "))


@pytest.mark.parametrize("error", [URLError("no route"), FileNotFoundError(2, "no file", "a.pth")])
def test_weights_that_cannot_be_loaded_are_no_wrong_option(error, monkeypatch):
    def create(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(networks, "create", create)
    with pytest.raises(ValueError, match="^model: expected weights of .* that can be loaded, got "):
        networks.network(replace(DIGITS, model_kwargs={"pretrained": True}), [9] * 10)


def test_the_check_of_a_network_changes_no_weight_and_no_draw():
    models = [networks.network(replace(DIGITS, exits=exits), [9] * 10) for exits in ((), None)]
    plain_stage, stem = models[0].stages[0], models[1].stages[0]
    assert torch.equal(plain_stage.bn1.running_mean, torch.zeros(16))
    assert torch.equal(plain_stage.conv1.weight, stem.conv1.weight)


def test_a_criterion_without_a_kernel_is_named(monkeypatch):
    energy = criteria.Criterion("energy", code=9, low=-math.inf, high=math.inf)
    monkeypatch.setitem(criteria.TABLE, "energy", energy)
    config = replace(DIGITS, criterion="energy", thresholds=2.0)
    with pytest.raises(ValueError, match="^criterion: expected one that the kernels .* 'energy'"):
        Trainer(config, CPU, console=QUIET)


# Checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(trainer, checkpoint) of a run before its first step."""
    folder = tmp_path_factory.mktemp("run")
    trainer = Trainer(replace(DIGITS, output=str(folder)), CPU, console=QUIET)
    trainer.save()
    return trainer, checkpoints.newest(folder / opening.CHECKPOINTS)[0]


def spoilt(state: dict, *path: str, value: object) -> dict:
    """A copy of a state with another value somewhere inside; without the entry for None."""
    name, *rest = path
    if rest:
        return {**state, name: spoilt(state[name], *rest, value=value)}
    return {k: v for k, v in {**state, name: value}.items() if k != name or v is not None}


@pytest.mark.parametrize(
    "path, value",
    [
        (["position"], None), (["position"], [1, 2]), (["position"], {}), (["optimizer"], {}),
        (["position", "totals"], []), (["position", "step"], "x"), (["position", "epoch"], -1),
        (["random"], {}), (["random"], [[]]), (["scaler"], None), (["global_batch"], 1.5),
        (["optimizer", "param_groups"], []), (["position", "more"], 1),
    ],
)  # fmt: skip
def test_a_state_of_another_shape_is_refused(path, value, saved):
    trainer, checkpoint = saved
    state = spoilt(checkpoint.state, *path, value=value)
    with pytest.raises(CheckpointError, match=f"^{checkpoint.path}: "):
        resume.restore(
            checkpoint._replace(state=state), trainer.config, trainer.learner, CPU, global_batch=64
        )


@pytest.mark.parametrize("state", [[], "text", None, {}])
def test_an_empty_state_is_refused_by_name(state, saved, tmp_path):
    trainer, checkpoint = saved
    path = checkpoints.save(tmp_path, 1, checkpoint.weights, None, state, checkpoint.metadata)
    if state == {}:
        with pytest.raises(CheckpointError, match=f"^{path}: .*'position'"):
            resume.restore(
                checkpoints.load(path), trainer.config, trainer.learner, CPU, global_batch=64
            )
    else:
        with pytest.raises(CheckpointError, match=f"^{path}: state.pt holds a .*, expected a dict"):
            checkpoints.load(path)


def test_a_file_without_content_and_metadata_of_another_shape_are_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda state, file: None)
        path = checkpoints.save(tmp_path, 1, {"a": torch.zeros(1)}, None, {}, {})
    with pytest.raises(CheckpointError, match="state.pt holds what this version cannot read"):
        checkpoints.load(path)
    files.save(tmp_path / "a.safetensors", {"a": torch.zeros(1)}, ["a list"])
    with pytest.raises(CheckpointError, match="expected metadata with names"):
        files.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("part", ["stages.0.conv1.weight", "heads.1.classifier.bias",
                                  "stages.0.bn1.running_var"])  # fmt: skip
def test_weights_that_are_not_finite_are_not_evaluated(part, saved, tmp_path, capsys):
    _, checkpoint = saved
    spoiled = {**checkpoint.weights, part: checkpoint.weights[part].clone()}
    spoiled[part].view(-1)[0] = math.inf if "bias" in part else math.nan
    path = tmp_path / "a.safetensors"
    files.save(path, spoiled, checkpoint.metadata)
    assert f"expected finite weights, got NaN or infinity in {part}" in refused(
        capsys, "eval", path
    )


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int8, torch.complex64, torch.float8_e4m3fn, torch.float64]
)
def test_weights_of_another_dtype_are_refused(dtype, saved, tmp_path, capsys):
    """`load_state_dict` would convert them."""
    trainer, checkpoint = saved
    name = "stages.0.conv1.weight"
    spoiled = {**checkpoint.weights, name: checkpoint.weights[name].to(dtype)}
    files.save(tmp_path / "a.safetensors", spoiled, checkpoint.metadata)
    said = refused(capsys, "eval", tmp_path / "a.safetensors")
    assert f"({name}: expected torch.float32, got {dtype})" in said
    with pytest.raises(CheckpointError, match=f"{name}: expected torch.float32, got {dtype}"):
        resume.restore(
            checkpoint._replace(weights=spoiled), trainer.config, trainer.learner, CPU,
            global_batch=64,
        )  # fmt: skip


@pytest.mark.parametrize(
    "name, value",
    [
        ("data", "x"), ("data", {"train": 5}), ("data", {"train": {"x": 1}}), ("data", [1]),
        ("data", {"train": {"counts": "ab"}}), ("data", {"train": {"counts": [1], "digests": 1}}),
        ("class_names", 5), ("class_names", [5]), ("class_counts", [None]), ("config", None),
        ("config", {"dataset": ["digits"]}),
    ],
)  # fmt: skip
def test_metadata_of_another_shape_are_refused(name, value, saved, tmp_path, capsys):
    trainer, checkpoint = saved
    metadata, path = {**checkpoint.metadata, name: value}, tmp_path / "a.safetensors"
    files.save(path, checkpoint.weights, metadata)
    said = refused(capsys, "eval", path)
    if isinstance(value, dict) and name == "config":
        assert said.startswith(f"elf-fast: {path}: dataset: expected one of ")
        return
    assert said.startswith(f"elf-fast: {path}: expected metadata of a run with {name}, got ")
    with pytest.raises(CheckpointError, match=f"^a: expected metadata of a run with {name}, got "):
        contents.check_resumed("a", metadata, trainer.contents, trainer.config)


def test_metadata_may_have_more_entries_of_a_later_version(saved):
    trainer, checkpoint = saved
    data = checkpoint.metadata["data"]
    more = {**data, "train": {**data["train"], "sizes": [1]}, "extra": None, "other": 3}
    metadata = {**checkpoint.metadata, "data": more}
    contents.check_resumed("a", metadata, trainer.contents, trainer.config)


def test_a_path_that_safetensors_cannot_open_is_named(tmp_path, capsys):
    path = os.fsencode(tmp_path) + b"/n\xff"
    with open(path, "wb"):
        pass
    said = refused(capsys, "eval", os.fsdecode(path))
    assert said.endswith("n\\udcff: expected a path in UTF-8; safetensors reads no other\n")


# A lack of memory is not blamed on what was tried


def no_memory(*arguments: object, **options: object) -> None:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")


class Grows(torch.nn.Module):
    """A network without memory in inference, or only when its gradients are wanted."""

    def __init__(self, *, gradients_only: bool):
        super().__init__()
        self.gradients_only = gradients_only
        self.first, self.fc = torch.nn.Linear(4, 4), torch.nn.Linear(4, 3)
        self.first.register_forward_hook(self.check)

    def check(self, module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        if output.requires_grad or not self.gradients_only:
            no_memory()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.first(x))


@pytest.mark.parametrize("gradients_only", [False, True])
def test_from_backbone_has_no_memory(gradients_only):
    backbone = Grows(gradients_only=gradients_only)
    with pytest.raises(RuntimeError, match="^DefaultCPUAllocator"):
        from_backbone(backbone, ["first"], 3, example_input=torch.zeros(2, 4))


@pytest.mark.parametrize("exits", [(), None], ids=["no exits", "exits"])
@pytest.mark.parametrize("where", ["create", "forward"])
def test_a_network_of_a_run_has_no_memory(where, exits, monkeypatch):
    backbone = CifarResNet(8, 10)
    backbone.forward = no_memory
    made = no_memory if where == "create" else lambda *arguments, **options: backbone
    monkeypatch.setattr(networks, "create", made)
    with pytest.raises(RuntimeError, match="^DefaultCPUAllocator"):
        networks.network(replace(DIGITS, exits=exits, model_kwargs={"a": 1}), [9] * 10)


def test_a_checkpoint_is_not_passed_over_for_want_of_memory(saved, monkeypatch):
    """The one before it would be taken in its place."""

    def not_mapped(*arguments: object, **options: object) -> None:
        raise OSError("Cannot allocate memory (os error 12)")

    _, checkpoint = saved
    for module, name, fails in ((torch, "load", no_memory), (safetensors, "safe_open", not_mapped)):
        with monkeypatch.context() as patch, pytest.raises((RuntimeError, OSError), match="memory"):
            patch.setattr(module, name, fails)
            checkpoints.newest(checkpoint.path.parent)


def test_a_run_that_is_opened_or_resumed_has_no_memory(saved, monkeypatch):
    trainer, checkpoint = saved
    monkeypatch.setattr(ELF, "load_state_dict", no_memory)
    with pytest.raises(RuntimeError, match="^DefaultCPUAllocator"):
        opening.load_weights(trainer.model, checkpoint.weights, checkpoint.path)
    with pytest.raises(RuntimeError, match="^DefaultCPUAllocator"):
        resume.restore(checkpoint, trainer.config, trainer.learner, CPU, global_batch=64)


def test_a_criterion_is_tried_without_memory(monkeypatch):
    monkeypatch.setattr(functional, "exit_gate", no_memory)
    with pytest.raises(RuntimeError, match="^DefaultCPUAllocator"):
        Trainer(replace(DIGITS, output="unused"), CPU, console=QUIET)
