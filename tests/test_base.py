"""Settings of the exits: checked once, where they are set, on both ELF modules."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from elf_fast import ELF, ExitHead, reference

BOTH = pytest.mark.parametrize("cls", [reference.ELF, ELF], ids=["reference", "elf_fast"])
SETTINGS = ("thresholds", "train_thresholds", "temperatures")


def elf(cls=ELF, classes: int = 5, **options):
    torch.manual_seed(0)
    stages = [nn.Conv2d(3 if e == 0 else 8, 8, 3, padding=1) for e in range(3)]
    return cls(stages, [ExitHead(8, classes) for _ in stages], **options)


BAD = [
    (7.0, ValueError, r"expected values in \[0, 1\], or inf .* got 7.0"),
    (math.nan, ValueError, r"expected values in \[0, 1\], or inf .* got nan"),
    ([0.5, -0.1], ValueError, r"expected values in \[0, 1\], or inf .* got -0.1"),
    (-math.inf, ValueError, ".* or inf to switch an exit off"),
    ([0.5], ValueError, r"expected a scalar, 2 values .* got shape \[1\]"),
    (torch.rand(2, 7), ValueError, r".* or \[2, 5\], one per class, got shape \[2, 7\]"),
    (torch.rand(2, 5, 1), ValueError, r"expected a scalar, 2 values .* got shape \[2, 5, 1\]"),
    ("high", TypeError, "expected a scalar, 2 values .* got 'high'"),
]


@BOTH
@pytest.mark.parametrize("name", ["thresholds", "train_thresholds"])
@pytest.mark.parametrize("value, error, message", BAD, ids=[str(b[0])[:20] for b in BAD])
def test_a_bad_threshold_is_refused_when_made_assigned_and_loaded(cls, name, value, error, message):
    with pytest.raises(error, match=f"{name}: {message}"):
        elf(cls, **{name: value})
    model = elf(cls, train_thresholds=0.5)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=f"{name}: {message}"):
        setattr(model, name, value)
    if isinstance(value, str):
        return
    loaded = {**before, name: torch.as_tensor(value)}
    with pytest.raises(RuntimeError, match=f"{name}: {message}"):
        model.load_state_dict(loaded)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@BOTH
def test_bad_temperatures_are_refused_when_assigned_and_loaded(cls):
    model = elf(cls)
    for value in (0.0, [1.0, math.nan]):
        with pytest.raises(ValueError, match="temperatures: expected positive finite numbers"):
            model.temperatures = value
        state = {**model.state_dict(), "temperatures": torch.as_tensor(value)}
        with pytest.raises(RuntimeError, match="temperatures: expected positive finite numbers"):
            model.load_state_dict(state)
    with pytest.raises(TypeError, match="temperatures: expected a scalar or 2 values"):
        model.temperatures = None
    assert model.temperatures.tolist() == [1.0, 1.0]


@BOTH
def test_the_criterion_decides_what_is_off_and_in_range(cls):
    model = elf(cls, criterion="entropy", thresholds=-math.inf)
    with pytest.raises(ValueError, match="or -inf to switch an exit off .* got inf"):
        model.thresholds = math.inf
    free = elf(cls, criterion=lambda logits: logits.amax(dim=1), thresholds=[-3.0, 1e6])
    free.thresholds = 70.0
    for bad in (math.nan, -math.inf):
        with pytest.raises(ValueError, match="expected finite values, or inf to switch"):
            free.thresholds = bad


@BOTH
@pytest.mark.parametrize(
    "value, kept",
    [
        (0.25, [0.25, 0.25]),
        (1, [1.0, 1.0]),
        (torch.tensor(0.5), [0.5, 0.5]),  # a tensor without dimensions
        ([0.5, math.inf], [0.5, math.inf]),
        (torch.tensor([0.5, 0.25], dtype=torch.float64), [0.5, 0.25]),
        ([[0.5] * 5, [0.25] * 5], [[0.5] * 5, [0.25] * 5]),
    ],
)
def test_what_is_assigned_is_converted_as_in_the_constructor(cls, value, kept):
    model = elf(cls, train_thresholds=0.5)
    for name in ("thresholds", "train_thresholds"):
        setattr(model, name, value)
        buffer = getattr(model, name)
        assert buffer.tolist() == kept and buffer.dtype == torch.float32
        assert model.get_buffer(name) is buffer and name in model.state_dict()
    given = torch.tensor([0.5, 0.25])
    model.thresholds = given
    given.fill_(0.0)
    assert model.thresholds.tolist() == [0.5, 0.25]
    model.train_thresholds = None
    assert model.train_thresholds is None


@BOTH
@pytest.mark.parametrize("other", [reference.ELF, ELF], ids=["reference", "elf_fast"])
def test_one_threshold_per_exit_and_one_per_class_load_into_each_other(cls, other):
    per_exit = elf(cls, thresholds=[0.3, 0.4], train_thresholds=0.6)
    per_class = elf(other, thresholds=torch.rand(2, 5), train_thresholds=torch.rand(2, 5))
    x = torch.randn(6, 3, 5, 5)
    for source, name in ((per_exit, "per exit"), (per_class, "per class")):
        for make in (cls, other):
            for start in (0.9, torch.full((2, 5), 0.9)):
                model = make(list(source.stages), list(source.heads), thresholds=start,
                             train_thresholds=start)  # fmt: skip
                model.load_state_dict(source.state_dict())
                assert torch.equal(model.thresholds, source.thresholds), name
                assert torch.equal(model.train_thresholds, source.train_thresholds)
                with torch.inference_mode():
                    expected, found = source.eval()(x), model.eval()(x)
                assert len(expected.exit_index.unique()) > 1
                assert torch.equal(found.exit_index, expected.exit_index)


def test_inside_another_module_the_message_names_the_place():
    outer = nn.Sequential(nn.Identity(), elf())
    state = {**outer.state_dict(), "1.thresholds": torch.tensor([7.0, 0.5])}
    with pytest.raises(RuntimeError, match=r"1.thresholds: expected values in \[0, 1\]"):
        outer.load_state_dict(state)


@BOTH
def test_copies_pickles_and_devices_keep_assigned_thresholds(cls):
    model = elf(cls)
    model.thresholds = torch.rand(2, 5)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.double()):
        assert torch.equal(twin.thresholds, model.thresholds)
        assert twin.thresholds.dtype == torch.float32
    moved = model.to("meta")
    moved.thresholds = 0.5
    assert moved.thresholds.tolist() == [0.5, 0.5]  # values wait where they are


@BOTH
def test_a_new_criterion_keeps_exits_off_and_checks_the_other_thresholds(cls):
    model = elf(cls, thresholds=[math.inf, 0.5], train_thresholds=math.inf)
    model.criterion = "entropy"
    assert model.thresholds.tolist() == [-math.inf, 0.5]
    assert model.train_thresholds.tolist() == [-math.inf] * 2
    model.load_state_dict(model.state_dict())
    model.criterion = nn.Softplus()  # a module is a callable, too
    assert model.thresholds.tolist() == [math.inf, 0.5]
    model.thresholds = 7.0
    with pytest.raises(ValueError, match=r"thresholds: expected values in \[0, 1\], .* got 7.0"):
        model.criterion = "confidence"
    assert isinstance(model.criterion, nn.Softplus) and model.thresholds.tolist() == [7.0] * 2
    model.thresholds = 0.5
    model.criterion = "confidence"
    assert model.criterion == "confidence" and "criterion" not in dict(model.named_children())
    with pytest.raises(ValueError, match="criterion: expected one of confidence"):
        model.criterion = "max"


@BOTH
def test_weights_and_drop_exited_are_checked_when_assigned(cls):
    model = elf(cls)
    model.exit_weights = 0.5
    assert model.exit_weights == (0.5, 0.5, 0.5)
    for bad in ([1.0, 1.0], [1.0, -1.0, 1.0], [1.0, math.nan, 1.0]):
        with pytest.raises(ValueError, match="exit_weights: expected "):
            model.exit_weights = bad
    for make in (lambda: elf(cls, drop_exited="no"), lambda: setattr(model, "drop_exited", "no")):
        with pytest.raises(TypeError, match="drop_exited: expected True, False or None, got 'no'"):
            make()


@BOTH
def test_exit_loss_changes_between_modules_and_functions(cls):
    x, y = torch.randn(6, 3, 5, 5), torch.zeros(6, dtype=torch.int64)
    model = elf(cls, exit_loss=nn.CrossEntropyLoss(reduction="none"))
    expected = model(x, y).loss
    model.exit_loss = lambda z, target: 2 * nn.functional.cross_entropy(z, target, reduction="none")
    torch.testing.assert_close(model(x, y).loss, 2 * expected)
    assert "exit_loss" not in dict(model.named_children())
    for again in (nn.CrossEntropyLoss(reduction="none"), None):
        model.exit_loss = again
        torch.testing.assert_close(model(x, y).loss, expected)


@BOTH
@pytest.mark.parametrize("move", [nn.Module.double, lambda m: m.to_empty(device="meta")])
def test_a_buffer_that_two_stages_read_stays_one(cls, move):
    first, second = nn.BatchNorm1d(8), nn.Module()
    second.register_buffer("mean", first.running_mean)
    second.forward = lambda x: x
    moved = move(cls([first, nn.Sequential(second)], [ExitHead(8, 5), ExitHead(8, 5)]))
    assert moved.stages[0].running_mean is moved.stages[1][0].mean


@BOTH
def test_a_scalar_in_a_file_sets_all_exits_whatever_the_shape_was(cls):
    for start in (0.9, torch.full((2, 5), 0.9)):
        model = elf(cls, thresholds=start)
        model.load_state_dict({**model.state_dict(), "thresholds": torch.tensor(0.4)})
        torch.testing.assert_close(model.thresholds, torch.full((2,), 0.4))


@BOTH
def test_a_model_on_the_meta_device_takes_what_it_loads(cls):
    source = elf(cls, thresholds=torch.rand(2, 5))
    with torch.device("meta"):
        made_there = cls([nn.Conv2d(3 if e == 0 else 8, 8, 3, padding=1) for e in range(3)],
                         [ExitHead(8, 5) for _ in range(3)])  # fmt: skip
    x = torch.randn(6, 3, 5, 5)
    for model in (elf(cls).to("meta"), made_there):
        model.load_state_dict(source.state_dict(), assign=True)
        assert torch.equal(model.thresholds, source.thresholds)
        assert model.temperatures.device == source.temperatures.device
        with torch.inference_mode():
            assert torch.equal(model.eval()(x).exit_index, source.eval()(x).exit_index)
