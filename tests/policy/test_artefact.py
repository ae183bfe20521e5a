"""The policy as a file, and on a model."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from elf_fast import ELF, ExitHead, digests, reference
from elf_fast.policy import ExitTable, Policy, PolicyError, Promise
from elf_fast.policy.measure import measured


def table(E: int = 3, N: int = 40, C: int = 5) -> ExitTable:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, C, (N,), generator=generator)
    logits = torch.randn(E, N, C, generator=generator)
    logits[:, torch.arange(N), target] += torch.arange(1, E + 1)[:, None].float()
    return ExitTable.from_logits(logits, target)


def policy(model: nn.Module | None = None, **changes) -> Policy:
    thresholds = torch.tensor([0.8, math.inf])
    found = table()
    made = Policy(
        criterion="confidence",
        thresholds=(0.8, math.inf),
        temperatures=(1.5, 0.5),
        promise=Promise("max_flops", 0.7),
        measured=measured(
            found, thresholds, (0.3, 0.7, 1.1), groups={"many": [0, 1], "few": [2, 3, 4]}
        ),
        data_digest=found.digest(),
        weights_digest=None if model is None else digests.of_weights(model.state_dict()),
    )
    return replace(made, **changes)


def elf(cls=ELF, classes: int = 5, exits: int = 3, **options):
    torch.manual_seed(0)
    stages = [nn.Conv2d(3 if e == 0 else 8, 8, 3, padding=1) for e in range(exits)]
    return cls(stages, [ExitHead(8, classes) for _ in stages], **options)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"thresholds": ((0.1, 0.2, math.inf, 0.3, 0.4), (0.5,) * 5)},
        {"criterion": "entropy", "thresholds": (0.1, -math.inf)},
        {"promise": Promise("max_ms", 4.0, batch=8, device="cpu")},
        {"promise": Promise("max_drop", 0.01, few_drop=0.05, guarantee=0.95)},
        {"weights_digest": "ab" * 32},
    ],
)
def test_a_policy_comes_back_as_it_was_saved(tmp_path, changes):
    made = policy(**changes)
    made.save(tmp_path / "policy.json")
    assert Policy.load(tmp_path / "policy.json") == made
    assert [p.name for p in tmp_path.iterdir()] == ["policy.json"]


def test_a_callable_is_not_saved(tmp_path):
    made = policy(criterion=lambda logits: logits.amax(1))
    with pytest.raises(PolicyError, match="criterion: expected one of confidence, .* no function"):
        made.save(tmp_path / "policy.json")
    assert not any(tmp_path.iterdir())


DROPPED = object()
DAMAGED = [
    ("format", "other", "format: expected 'elf_fast policy 1', got 'other'"),
    ("criterion", "magic", "criterion: expected one of confidence, margin, entropy, got 'magic'"),
    ("criterion", 3, "criterion: expected text, got 3"),
    ("criterion", DROPPED, "criterion: expected text, got none"),
    ("thresholds", [0.5], "thresholds: expected 2, one per temperature, got 1"),
    ("thresholds", [0.5, 7], r"thresholds: expected values in \[0, 1\], or inf .* got 7.0"),
    ("thresholds", [[0.5], [0.5, 0.6]], r"thresholds: .* got rows of several lengths"),
    ("thresholds", [0.5, "x"], "thresholds: expected a list of numbers or nulls"),
    ("thresholds", [0.5, True], "thresholds: expected a list of numbers or nulls"),
    ("temperatures", [1.0, 0.0], "temperatures: expected positive finite numbers, got 0.0"),
    ("temperatures", "hot", "temperatures: expected a list of numbers, got 'hot'"),
    ("promise", [], r"promise: expected names with values, got \[\]"),
    ("promise.aim", "gold", "promise.aim: expected one of accuracy, .* got 'gold'"),
    ("promise.limit", -1, "promise.limit: expected a number of at least 0, got -1"),
    ("promise.guarantee", 2, r"promise.guarantee: expected a number in \[0, 1\], got 2"),
    ("promise.batch", 0, "promise.batch: expected an integer of at least 1, got 0"),
    ("measured.samples", 1.5, "measured.samples: expected an integer of at least 1, got 1.5"),
    ("measured.accuracy", [0.5, 0.6, 0.7], "measured.accuracy: expected a share and its interval"),
    ("measured.exits", [], "measured.exits: expected 3, one per exit, got 0"),
    ("measured.exits", {}, "measured.exits: expected a list"),
    ("measured.groups", 5, "measured.groups: expected names with values, got 5"),
    ("measured.groups.few", None, "measured.groups.few: expected names with values, got None"),
    ("measured.groups.few.exit_shares", [], "measured.groups.few.exit_shares: expected 3, got 0"),
    ("data_digest", "../x", "data_digest: expected 16 to 64 hexadecimal digits, got '../x'"),
    ("weights_digest", 5, "weights_digest: expected 16 to 64 hexadecimal digits, got 5"),
    ("version", None, "version: expected text, got None"),
]


@pytest.mark.parametrize(
    "field, value, message", DAMAGED, ids=[f"{d[0]}-{d[1]}"[:40] for d in DAMAGED]
)
def test_a_damaged_field_is_named_with_its_file(tmp_path, field, value, message):
    path = tmp_path / "policy.json"
    policy().save(path)
    held = json.loads(path.read_text())
    *outer, name = field.split(".")
    inside = held
    for key in outer:
        inside = inside[key]
    if value is DROPPED:
        del inside[name]
    else:
        inside[name] = value
    path.write_text(json.dumps(held))
    with pytest.raises(PolicyError, match=f"policy.json: {message}"):
        Policy.load(path)


@pytest.mark.parametrize(
    "content", [b"", b"[", b"\xff\xfe", b"[" * 100_000, b"[]", b"1e999", b"null"]
)
def test_what_is_no_policy_is_refused(tmp_path, content):
    path = tmp_path / "policy.json"
    path.write_bytes(content)
    with pytest.raises(PolicyError, match="policy.json: "):
        Policy.load(path)
    with pytest.raises(PolicyError, match="expected the file of a policy, found none"):
        Policy.load(tmp_path / "none.json")
    with pytest.raises(PolicyError, match="cannot be read"):
        Policy.load(tmp_path)


# On a model


@pytest.mark.parametrize("cls", [reference.ELF, ELF], ids=["reference", "elf_fast"])
def test_a_model_takes_criterion_thresholds_and_temperatures(cls):
    model = elf(cls, thresholds=0.9)
    made = policy(model, criterion="entropy", thresholds=(0.4, -math.inf))
    model.apply_policy(made)
    assert model.criterion == "entropy" and model.temperatures.tolist() == [1.5, 0.5]
    assert model.thresholds.tolist() == pytest.approx([0.4, -math.inf])
    rows = ((0.1,) * 5, (0.2,) * 5)
    model.apply_policy(policy(model, thresholds=rows))
    torch.testing.assert_close(model.thresholds, torch.tensor(rows))
    assert model.criterion == "confidence"


def test_a_policy_for_another_network_is_refused_and_changes_nothing():
    model = elf(thresholds=0.9)
    before = copy.deepcopy(model.state_dict())
    other = elf()
    with torch.no_grad():
        other.heads[0].classifier.weight[0, 0] += 1
    wrong = [
        (policy(other), "policy: expected one for these weights .* calibrate again"),
        (policy(thresholds=((0.5,) * 7,) * 2), r"policy.thresholds: .* got shape \[2, 7\]"),
    ]
    for made, message in wrong:
        with pytest.raises(ValueError, match=message):
            model.apply_policy(made)
    with pytest.raises(ValueError, match="policy.thresholds: expected a scalar, 3 values"):
        elf(exits=4).apply_policy(policy())
    with pytest.raises(TypeError, match="policy: expected a Policy, got 0.5"):
        model.apply_policy(0.5)
    scored = elf(criterion=lambda z: z.amax(1), thresholds=5.0, train_thresholds=7.0)
    with pytest.raises(ValueError, match="train_thresholds: expected values in"):
        scored.apply_policy(policy())
    assert scored.thresholds.tolist() == [5.0, 5.0] and scored.temperatures.tolist() == [1, 1]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.criterion == "confidence"


def test_settings_do_not_change_the_digest_of_the_weights():
    model = elf()
    before = digests.of_weights(model.state_dict())
    model.thresholds, model.temperatures = 0.1, 3.0
    assert digests.of_weights(model.state_dict()) == before
    with torch.no_grad():
        model.stages[2].bias[0] += 1
    assert digests.of_weights(model.state_dict()) != before
