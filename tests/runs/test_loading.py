"""`elf_fast.load`: what it opens, what the result carries, and what it refuses."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

import elf_fast
from elf_fast import digests, inference
from elf_fast.data import Preprocessing
from elf_fast.policy import ExitTable, Policy, PolicyError, Promise
from elf_fast.policy.measure import measured
from elf_fast.runs import files, opening
from elf_fast.runs.config import TrainConfig
from elf_fast.runs.datasets import load_splits
from elf_fast.runs.files import CheckpointError

IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
NAMES = tuple("0123456789")


def same(one: elf_fast.ELF, other: elf_fast.ELF) -> bool:
    """Whether two models decide alike."""
    with torch.inference_mode():
        a, b = one(IMAGES), other(IMAGES)
    return torch.equal(a.logits, b.logits) and torch.equal(a.exit_index, b.exit_index)


def accuracy(model: elf_fast.ELF, part) -> float:
    images = torch.stack([part[i][0] for i in range(len(part))])
    with torch.inference_mode():
        return (model(images).prediction == part.targets).double().mean().item()


def a_policy(model: elf_fast.ELF, **changes) -> Policy:
    """A policy for the model, with other thresholds than its own."""
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(10)
    table = ExitTable.from_logits(torch.randn(3, 10, 10, generator=generator), target)
    options = {
        "criterion": "margin",
        "thresholds": (0.3, 0.2),
        "temperatures": (1.5, 0.5),
        "promise": Promise("max_flops", 0.7),
        "measured": measured(table, torch.tensor([0.3, 0.2]), (0.3, 0.7, 1.1), groups={}),
        "data_digest": table.digest(),
        "weights_digest": digests.of_weights(model.state_dict()),
    }
    return Policy(**{**options, **changes})


def test_a_run_opens_without_its_data(digits_run):
    folder, results = digits_run
    before = torch.get_rng_state()
    model = elf_fast.load(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training and model.policy == Policy.load(folder / "policy.json")
    assert model.class_names == NAMES and list(model.class_counts) == results["class_counts"]
    assert model.transform == Preprocessing(16, "squash", mean=(0.5,) * 3, std=(0.5,) * 3)
    test = load_splits(TrainConfig(dataset="digits", imbalance=50.0)).test
    assert accuracy(model, test) == results["test"]["overall"]


def test_the_parts_of_a_run_open(digits_run, tmp_path):
    folder, _ = digits_run
    model = elf_fast.load(folder)
    shutil.copy(folder / "model.safetensors", tmp_path / "alone.safetensors")
    assert same(elf_fast.load(tmp_path / "alone.safetensors"), model)
    last = sorted((folder / "checkpoints").iterdir())[-1]
    checkpoint = elf_fast.load(last)
    assert checkpoint.transform == model.transform and checkpoint.class_names == NAMES
    interrupted = tmp_path / "run"
    shutil.copytree(folder / "checkpoints", interrupted / "checkpoints")
    assert same(elf_fast.load(interrupted), checkpoint)
    (interrupted / "checkpoints" / last.name / "model.safetensors").write_bytes(b"cut")
    older = elf_fast.load(interrupted)
    assert not same(older, checkpoint)  # the checkpoint before it


def test_a_run_of_an_earlier_version_opens(digits_run, tmp_path):
    folder, _ = digits_run
    weights, metadata = opening.read(folder)
    old = {k: metadata[k] for k in ("network", "config", "class_counts", "seed")}
    files.save(tmp_path / "model.safetensors", weights, old)
    model = elf_fast.load(tmp_path)
    assert same(model, elf_fast.load(folder))
    assert model.class_names == NAMES and model.transform.size == 16


def test_the_demo_opens(demo_output):
    folder, _ = demo_output
    model = elf_fast.load(folder)
    assert model.transform.shape == (1, 16, 16) and model.class_names == NAMES
    results = json.loads((folder / "results.json").read_text())
    from elf_fast.data import long_tailed_digits

    test = long_tailed_digits(50.0).test
    assert accuracy(model, test) == results["runs"][0]["test"]["elf"]["overall"]


def test_what_it_carries_survives(digits_run):
    model = elf_fast.load(digits_run[0])
    names = {name for name, _ in model.named_modules()} | set(model.state_dict())
    assert not {n for n in names if n.startswith(("transform", "class", "policy"))}
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to(torch.float64),
              elf_fast.fuse(elf_fast.unfuse(model))]  # fmt: skip
    for twin in copies:
        assert twin.class_names == NAMES and twin.transform == model.transform
    model = elf_fast.load(digits_run[0])
    engine = inference.compile(model, IMAGES, engine="eager")
    assert torch.equal(engine(IMAGES).exit_index, model(IMAGES).exit_index)


def test_the_policy_beside_the_weights_is_applied(digits_run, tmp_path):
    folder, _ = digits_run
    run = shutil.copytree(folder, tmp_path / "run")
    plain = elf_fast.load(run)
    a_policy(plain).save(run / "policy.json")
    for path in (run, run / "model.safetensors"):
        model = elf_fast.load(path)
        assert model.criterion == "margin" and model.policy == a_policy(plain)
        assert model.thresholds.tolist() == [pytest.approx(0.3), pytest.approx(0.2)]
        assert model.temperatures.tolist() == [1.5, 0.5]
    a_policy(plain, weights_digest="ab" * 32).save(run / "policy.json")
    with pytest.raises(ValueError, match=r"policy\.json: policy: expected one for these weights"):
        elf_fast.load(run)
    (run / "policy.json").write_text("{")
    with pytest.raises(PolicyError, match=r"policy\.json: expected a policy in JSON"):
        elf_fast.load(run)


def test_options_that_load_other_weights_are_left_out(digits_run, tmp_path):
    """They might have to be downloaded, and a file must not name other files to read."""
    weights, metadata = opening.read(digits_run[0])
    for options in ({"pretrained": True}, {"checkpoint_path": "/etc/passwd"}, {"weights": "IMG"}):
        config = {**metadata["config"], "model_kwargs": options}
        files.save(tmp_path / "a.safetensors", weights, {**metadata, "config": config})
        elf_fast.load(tmp_path / "a.safetensors")


def surest(logits):
    """A user's criterion."""
    return logits.amax(dim=1)


def test_a_criterion_that_was_a_function_is_given_again(digits_run, tmp_path):
    weights, metadata = opening.read(digits_run[0])
    named = {**metadata, "config": {**metadata["config"], "criterion": "callable surest"}}
    files.save(tmp_path / "a.safetensors", weights, named)
    with pytest.raises(CheckpointError, match="criterion: the run used 'callable surest'"):
        elf_fast.load(tmp_path / "a.safetensors")
    assert elf_fast.load(tmp_path / "a.safetensors", criterion=surest).criterion is surest


def test_the_criterion_of_a_network_is_not_replaced(digits_run):
    """Its thresholds are for the one that it was trained with."""
    with pytest.raises(ValueError, match="criterion: expected none for a network whose thresholds"):
        elf_fast.load(digits_run[0], criterion="entropy")


def test_the_policy_that_was_applied_last_is_the_models(digits_run, tmp_path):
    model = elf_fast.load(digits_run[0])
    model.apply_policy(chosen := a_policy(model))
    assert model.policy is chosen
    elf_fast.save(model, tmp_path)
    assert elf_fast.load(tmp_path).policy.thresholds == chosen.thresholds
    model.apply_policy(a_policy(model, criterion=surest))
    elf_fast.save(model, tmp_path / "scored")
    assert not (tmp_path / "scored" / "policy.json").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"network": "resnet"}, "got network 'resnet'"),
        ({"network": ["a"]}, r"got network \['a'\]"),
        ({"network": "own"}, r"elf_fast.load\(path, model=model\)"),
        ({"network": "from_backbone"}, "its network cannot be built here"),
        ({"config": [1]}, "config: expected the settings of a run"),
        ({"config": {"gone": 1}}, "gone: expected a setting"),
        ({"class_names": ["a"]}, "class_counts: expected 1, one per class, got 10"),
        ({"class_names": "abc"}, "class_names: expected texts, got 'abc'"),
        ({"class_counts": ["many"]}, "class_counts: expected integers"),
        ({"class_counts": [5] * 9, "class_names": list("abcdefghi")}, "weights do not fit"),
        ({"preprocessing": {"size": 16}}, "preprocessing: expected the entries"),
        ({"preprocessing": 3}, "preprocessing: expected the entries"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(digits_run, tmp_path, changes, message):
    weights, metadata = opening.read(digits_run[0])
    files.save(tmp_path / "a.safetensors", weights, {**metadata, **changes})
    with pytest.raises(CheckpointError, match=message) as error:
        elf_fast.load(tmp_path / "a.safetensors")
    assert "a.safetensors" in str(error.value)


def edited(content: bytes) -> bytes:
    return json.dumps({**json.loads(content), "class_names": list("abcdefghij")}).encode()


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("config.json", edited, "config.json: class_names: expected .* got .*'a'.*mixed, or it"),
        ("config.json", lambda content: b"{}", "config.json: class_counts: .* got none"),
        ("config.json", lambda content: b"[1]", "config.json: expected entries with names"),
        ("config.json", lambda content: content[:50], "config.json: expected JSON"),
        ("config.json", lambda content: b"\xff\xfe" * 9, "config.json: expected JSON"),
        ("model.safetensors", lambda content: content[:500], "model.safetensors: .*cut short"),
        ("model.safetensors", lambda content: content[:-1] + b"!", "checksum differs"),
    ],
)
def test_a_damaged_or_mixed_folder_is_refused(digits_run, tmp_path, name, change, message):
    for file in ("config.json", "model.safetensors"):
        shutil.copy(digits_run[0] / file, tmp_path / file)
    elf_fast.load(tmp_path)
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        elf_fast.load(tmp_path)


def test_a_file_of_another_program_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="expected format 'elf_fast checkpoint 1', got 'pt'"):
        elf_fast.load(tmp_path)


@pytest.mark.parametrize(
    "path, options, error, message",
    [
        (
            "ann/birds",
            {},
            CheckpointError,
            r"elf_fast.load\(huggingface_hub.snapshot_download\('an",
        ),
        (
            "./missing",
            {},
            CheckpointError,
            "missing: expected a folder or a file of weights, found",
        ),
        ("a\0b", {}, ValueError, "path: expected a path without NUL"),
        (3, {}, TypeError, "path: expected a folder or a file, got 3"),
        (".", {"model": nn.Linear(1, 1)}, TypeError, "model: expected an elf_fast.ELF"),
        (".", {"device": "gpu"}, ValueError, "device: expected cpu, cuda"),
        ("x" * 5000, {}, CheckpointError, "expected a folder or a file of weights, found none"),
    ],
)
def test_wrong_calls(path, options, error, message):
    with pytest.raises(error, match=message):
        elf_fast.load(path, **options)


def test_importing_the_package_imports_no_library_of_images():
    code = (
        "import sys, elf_fast\n"
        "late = {'safetensors', 'PIL', 'torchvision', 'timm', 'huggingface_hub'}\n"
        "assert not late & set(sys.modules)\n"
        "assert callable(elf_fast.load) and callable(elf_fast.save)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
