"""Calibration, loop, checkpoints and the words made from results."""

import json
import math

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("torchmetrics")

from elf_fast.bench.inference import check_agreement
from elf_fast.data import long_tailed_digits
from elf_fast.flops import Flops, count_flops
from elf_fast.reference import ELFOutput
from elf_fast.training import (
    calibrate,
    checkpoint,
    demo,
    network,
    summary,
    throughput,
)
from elf_fast.training.loop import Schedule, batches, learning_rate_factor, predict, train


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with demo.one_thread():
        yield


@pytest.fixture(scope="module")
def digits():
    return long_tailed_digits(50.0)


# FLOPs


def test_the_twin_without_exits_costs_what_the_shares_are_taken_of():
    image = torch.zeros(1, 1, 16, 16)
    with_exits = count_flops(network.with_exits(10), image)
    without = count_flops(network.without_exits(10), image)
    assert with_exits.without_exits == without.leaving_at(0)


# Calibration


def test_the_sweep_and_the_cheapest_of_the_most_accurate_thresholds():
    table = calibrate.ExitTable(
        confidence=torch.tensor([[0.9, 0.8, 0.7, 0.3], [0.1, 0.1, 0.1, 0.1]]),
        correct=torch.tensor([[True, True, False, False], [True, True, True, False]]),
    )
    flops = Flops((10, 10), (0, 0))
    points = calibrate.sweep(table, flops, (0.6, 0.75, 0.85, math.inf))
    assert [(p.accuracy, p.flops) for p in points] == [(0.5, 12.5), (0.75, 15), (0.75, 17.5),
                                                       (0.75, 20)]  # fmt: skip
    assert calibrate.choose(points).threshold == 0.75
    equal = [p._replace(accuracy=0.5, flops=15.0) for p in points]
    assert calibrate.choose(equal) == equal[-1]  # the most cautious


@pytest.mark.parametrize("criterion", ["confidence", "margin", "entropy"])
def test_the_candidates_go_from_bold_to_never(digits, criterion):
    model = network.with_exits(10, criterion=criterion)
    table = calibrate.exit_table(model, batches(digits.validation))
    points = calibrate.sweep(table, count_flops(model, digits.test.images[:1]))
    flops = [p.flops for p in points]
    assert flops == sorted(flops) and math.isinf(points[-1].threshold)
    model.thresholds.fill_(points[-1].threshold)
    assert set(predict(model, digits.validation.images[:8]).exit_index.tolist()) == {2}
    assert len(points) == len(calibrate.THRESHOLDS)


def test_when_every_threshold_loses_the_exits_stay_off():
    point = calibrate.OperatingPoint
    points = [point(0.5, 0.8, 10.0), point(0.9, 0.89, 15.0), point(math.inf, 0.9, 20.0)]
    assert calibrate.choose(points).threshold == math.inf


def test_equally_cheap_points_are_settled_by_accuracy_and_then_caution():
    point = calibrate.OperatingPoint
    points = [point(0.5, 0.9, 10.0), point(0.6, 0.92, 10.0), point(0.7, 0.92, 10.0),
              point(math.inf, 0.9, 20.0)]  # fmt: skip
    assert calibrate.choose(points).threshold == 0.7


def test_within_a_limit_of_flops_the_most_accurate_and_beyond_it_the_cheapest():
    point = calibrate.OperatingPoint
    points = [point(0.5, 0.7, 10.0), point(0.7, 0.8, 12.0), point(math.inf, 0.9, 20.0)]
    assert [calibrate.choose(points, limit).threshold for limit in (20.0, 19.9, 11.0, 9.0)] == [
        math.inf, 0.7, 0.5, 0.5
    ]  # fmt: skip


@pytest.mark.parametrize("criterion", ["confidence", "margin", "entropy"])
def test_the_sweep_agrees_with_the_model_it_stands_for(digits, criterion):
    torch.manual_seed(0)
    model = network.with_exits(10, criterion=criterion).eval()
    images, targets = digits.validation.images, digits.validation.targets
    table = calibrate.exit_table(model, batches(digits.validation))
    middle = table.confidence[0].sort().values[99:101]
    threshold = float(middle.mean())  # between two samples: no tie for rounding to settle
    model.thresholds.fill_(threshold)
    out = predict(model, images, batch_size=64)
    assert torch.equal(table.exit_index(threshold), out.exit_index)
    correct = table.correct.gather(0, out.exit_index[None])[0]
    assert torch.equal(correct, out.prediction == targets)
    assert len(set(out.exit_index.tolist())) > 1


# Training


def test_the_learning_rate_rises_then_falls_to_zero():
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(101)]
    assert factors[9] == 1.0 and factors[100] == pytest.approx(0.0)
    assert factors[:10] == sorted(factors[:10]) and factors[10:] == sorted(factors[10:])[::-1]
    assert learning_rate_factor(0, 1, 0.1) == 1.0


@pytest.mark.parametrize("make", [network.with_exits, network.without_exits])
def test_training_learns_and_repeats(digits, make):
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = make(10, widths=(4, 8, 8))
        history = train(model, digits.train, Schedule(epochs=3), seed=0)
        runs.append((history, model.state_dict()))
    (history, state), (again, state_again) = runs
    assert history == again
    assert all(torch.equal(state[name], state_again[name]) for name in state)
    assert [s.epoch for s in history] == [1, 2, 3] and history[-1].loss < history[0].loss
    assert all(sum(s.exit_shares) == pytest.approx(1) for s in history)
    assert not model.training


# Throughput


def _output(exit_index, prediction, confidence):
    n = len(exit_index)
    return ELFOutput(
        torch.zeros(n, 2), torch.tensor(prediction), torch.tensor(confidence),
        torch.tensor(exit_index), None,
    )  # fmt: skip


def test_speed_is_refused_for_results_that_differ_but_not_for_ties():
    thresholds = torch.tensor([0.5])
    ours = _output([0, 1], [0, 1], [0.5000001, 0.6])
    check_agreement(ours, ours, thresholds)
    check_agreement(ours, _output([1, 1], [1, 1], [0.9, 0.6]), thresholds)
    with pytest.raises(RuntimeError, match="disagree on 1 of 2"):
        check_agreement(ours, _output([0, 1], [0, 0], [0.5, 0.6]), thresholds)
    with pytest.raises(RuntimeError, match="disagree on 1 of 2"):
        check_agreement(ours, _output([0, 0], [0, 1], [0.5, 0.6]), thresholds)


def test_throughput_of_all_three_is_positive(digits):
    entries = throughput.measure(
        network.with_exits(10, widths=(4, 8, 8)), network.without_exits(10, widths=(4, 8, 8)),
        digits.test.images[:40], batch_sizes=(16, 64), repeats=2,
    )  # fmt: skip
    assert [e["batch_size"] for e in entries] == [16, 40]
    for entry in entries:
        assert {"full", "reference", "elf_fast"} < set(entry["images_per_second"])
        assert set(entry["ratios"]) == {"elf_fast/full", "elf_fast/reference", "elf_fast_off/full"}
        assert all(q[0] > 0 for q in entry["images_per_second"].values())


# Checkpoints


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3), "t": torch.tensor([math.inf])}
    checkpoint.save(path, state, {"class_counts": [3, 1], "name": "π"})
    return path, state


def test_a_checkpoint_comes_back_as_it_was(saved):
    path, state = saved
    loaded, metadata = checkpoint.load(path)
    assert metadata == {"class_counts": [3, 1], "name": "π"}
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[k], state[k]) and loaded[k].dtype == state[k].dtype
               for k in state)  # fmt: skip
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_saving_again_keeps_the_previous_checkpoint(saved):
    path, _ = saved
    before = path.read_bytes()
    checkpoint.save(path, {"a": torch.zeros(1)}, {})
    assert checkpoint.previous(path).read_bytes() == before
    assert checkpoint.load(path)[0]["a"].tolist() == [0.0]
    assert len(list(path.parent.iterdir())) == 2


def test_a_failed_save_leaves_the_checkpoint_alone(saved, monkeypatch):
    path, _ = saved
    before = path.read_bytes()
    monkeypatch.setattr(checkpoint.os, "fsync", _no_space)
    with pytest.raises(OSError, match="No space") as error:
        checkpoint.save(path, {"a": torch.zeros(1)}, {})
    assert error.value.filename == str(path)
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*.partial"))


def _no_space(descriptor):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_a_truncated_checkpoint_is_refused(saved, keep):
    path, _ = saved
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(checkpoint.CheckpointError, match="cut short, damaged"):
        checkpoint.load(path)


def test_a_changed_weight_is_refused(saved):
    path, _ = saved
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(checkpoint.CheckpointError, match=r"model\.safetensors: .*checksum differs"):
        checkpoint.load(path)


def test_changed_metadata_is_refused(saved):
    path, _ = saved
    path.write_bytes(path.read_bytes().replace(b"[3, 1]", b"[3, 2]"))
    with pytest.raises(checkpoint.CheckpointError, match="checksum differs"):
        checkpoint.load(path)


def test_files_of_other_makers_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(checkpoint.CheckpointError, match="only checkpoints that elf-fast wrote"):
        checkpoint.load(tmp_path / "other.safetensors")
    with pytest.raises(checkpoint.CheckpointError, match="found none"):
        checkpoint.load(tmp_path / "missing.safetensors")


# Words


def _results(ours, theirs, ratio=(1.5, 2.0, 2.5)):
    def test(overall, shares, flops_share):
        return {"overall": overall, "many": None, "medium": 0.9, "few": overall,
                "exit_shares": shares, "exit_shares_by_class": [shares, shares],
                "flops_share": flops_share}  # fmt: skip

    rates = {"full": 100, "reference": 150, "elf_fast": 200, "reference_off": 90,
             "elf_fast_off": 95}  # fmt: skip
    ratios = {"elf_fast/full": ratio, "elf_fast/reference": [0.9, 1.0, 1.1],
              "elf_fast_off/full": [0.94, 0.95, 0.96]}  # fmt: skip
    return {
        "class_counts": [50, 2],
        "settings": {"loss_name": "cross-entropy", "drop_exited": False},
        "split": {"train": 52, "validation": 4, "test": 8},
        "throughput": [
            {
                "batch_size": 16,
                "images_per_second": {name: [0, rate, 0] for name, rate in rates.items()},
                "ratios": ratios,
            }
        ],
        "runs": [
            {"seed": i, "threshold": 0.5, "seconds": {"without_exits": 1.0, "elf": 2.0},
             "test": {"elf": test(a, [0.5, 0.25, 0.25], 0.4),
                      "never": test(a, [0.0, 0.0, 1.0], 1.04),
                      "without_exits": test(b, [1.0], 1.0)}}
            for i, (a, b) in enumerate(zip(ours, theirs, strict=True))
        ],
    }  # fmt: skip


def test_losing_is_said_in_so_many_words():
    text = " ".join(summary.sentences(_results([0.80, 0.81, 0.79], [0.9, 0.9, 0.9])))
    assert "uses 40% of the FLOPs" in text
    assert "LOSES accuracy overall: -10.0 ± 1.0 points, paired over 3 seeds." in text
    assert "Where ELF loses accuracy: few (-10.0 ± 1.0 points)." in text
    text = " ".join(summary.sentences(_results([0.9], [0.8], ratio=(0.6, 0.7, 0.8))))
    assert "at 0.70x (SLOWER; 0.60 to 0.80) of the full network's speed" in text
    assert "1.00x (level; 0.90 to 1.10) of the reference's" in text
    assert "at 0.95x (SLOWER; 0.94 to 0.96) of the full network's" in text
    assert "One seed says little" in text


def test_a_gain_inside_the_scatter_is_called_a_tie():
    text = " ".join(summary.sentences(_results([0.95, 0.90, 0.88], [0.9, 0.92, 0.9])))
    assert "gains accuracy overall" in text and "read it as a tie" in text
    text = " ".join(summary.sentences(_results([0.95, 0.96, 0.95], [0.9, 0.9, 0.9])))
    assert "gains accuracy overall" in text and "tie" not in text
    assert "loses accuracy in none of the groups" in text


def test_the_table_has_an_entry_per_model_and_no_number_for_an_empty_group():
    headings, rows = summary.table(_results([0.8, 0.9], [0.7, 0.8]))
    cells = {label.strip(): values for label, values in rows}
    assert len(headings) == 4 and all(len(values) == 3 for values in cells.values())
    assert cells["test accuracy, %"] == ["75.0 ± 7.1", "85.0 ± 7.1", "85.0 ± 7.1"]
    assert cells["many (0 classes, over 100 images)"] == ["none"] * 3
    assert cells["left at exit 1 / 2 / 3, %"] == ["", "0 / 0 / 100", "50 / 25 / 25"]
    assert cells["ELF, elf_fast"] == ["", "95", "200"]
    json.dumps(rows)
