"""Metrics against numbers worked out by hand, torchmetrics' own and other ways of counting."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from torch import distributed, multiprocessing

pytest.importorskip("torchmetrics")

import torchmetrics

from elf_fast.flops import Flops
from elf_fast.metrics import ELFMetrics, class_groups
from elf_fast.reference import ELFOutput
from elf_fast.samplers import EvaluationSampler

FLOPS = Flops(stages=(10, 20, 30), heads=(1, 2, 3))


def output(prediction, exit_index, classes=3, confidence=0.5):
    """Samples whose prediction has the probability `confidence`."""
    prediction = torch.tensor(prediction, dtype=torch.int64)
    p = torch.full((len(prediction), classes), (1 - confidence) / max(classes - 1, 1))
    p[torch.arange(len(prediction)), prediction] = confidence
    exit_index = torch.tensor(exit_index, dtype=torch.int64)
    return ELFOutput(p.log(), prediction, p.amax(1), exit_index, None)


def random_output(n, classes=3, exits=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, classes, generator=generator)
    logits[::7] *= 20  # probabilities of exactly 1
    exit_index = torch.randint(exits, (n,), generator=generator)
    target = torch.randint(classes, (n,), generator=generator)
    target = torch.where(torch.rand(n, generator=generator) < 0.6, logits.argmax(1), target)
    return ELFOutput(logits, logits.argmax(1), logits.amax(1), exit_index, None), target


def computed(out, target, class_counts=(500, 200, 5), **options):
    metrics = ELFMetrics(class_counts, FLOPS, **options)
    metrics.update(out, torch.as_tensor(target))
    return metrics.compute()


def test_groups_split_at_20_and_100():
    assert class_groups([101, 100, 20, 19, 0]) == {"many": [0], "medium": [1, 2], "few": [3, 4]}


def test_against_numbers_worked_out_by_hand():
    m = computed(output([0, 0, 1, 1, 0, 2], [0, 1, 0, 2, 1, 2]), [0, 0, 1, 0, 1, 2])
    assert m["samples"] == 6
    assert m["overall"] == 4 / 6
    assert m["per_class"] == [2 / 3, 1 / 2, 1.0]
    assert m["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert (m["many"], m["medium"], m["few"]) == (3 / 5, None, 1.0)
    assert m["exit_accuracy"] == [1.0, 1 / 2, 1 / 2]
    assert m["exit_shares"] == [2 / 6, 2 / 6, 2 / 6]
    assert m["exit_shares_by_class"] == [[1 / 3, 1 / 3, 1 / 3], [1 / 2, 1 / 2, 0], [0, 0, 1]]
    assert m["exit_shares_by_group"] == {"many": [2 / 5, 2 / 5, 1 / 5], "medium": None,
                                         "few": [0, 0, 1]}  # fmt: skip
    assert m["early_wrong"] == 1 / 6
    assert m["early_wrong_by_group"] == {"many": 1 / 5, "medium": None, "few": 0.0}
    assert m["flops_per_sample"] == (2 * 11 + 2 * 33 + 2 * 66) / 6
    assert m["flops_share"] == pytest.approx((2 * 11 + 2 * 33 + 2 * 66) / 6 / 63)
    assert m["ece"] == pytest.approx(4 / 6 - 0.5)


def test_metrics_without_samples_are_none():
    m = computed(output([0], [1]), [0], [30, 30, 500])
    assert m["exit_accuracy"] == [None, 1.0, None]
    assert m["exit_shares_by_class"] == [[0, 1, 0], None, None]
    assert m["per_class"] == [1.0, None, None] and m["balanced_accuracy"] == 1.0
    assert m["many"] is None and m["early_wrong_by_group"]["many"] is None


def test_an_empty_evaluation_is_none_all_over():
    m = computed(output([], []), torch.zeros(0, dtype=torch.int64))
    assert m.pop("samples") == 0
    assert m.pop("samples_by_group") == {"many": 0, "medium": 0, "few": 0}
    assert (
        m.pop("exit_accuracy") == m.pop("per_class") == m.pop("exit_shares_by_class") == [None] * 3
    )
    nobody = {"many": None, "medium": None, "few": None}
    assert m.pop("exit_shares_by_group") == m.pop("early_wrong_by_group") == nobody
    assert m.pop("confusions") == []
    assert set(m.values()) == {None}


def test_accuracy_and_calibration_agree_with_torchmetrics():
    out, target = random_output(500)
    m = computed(out, target)
    for key, average in (("overall", "micro"), ("balanced_accuracy", "macro")):
        theirs = torchmetrics.classification.MulticlassAccuracy(3, average=average)
        assert m[key] == pytest.approx(theirs(out.prediction, target).item(), rel=1e-6)
    theirs = torchmetrics.classification.MulticlassAccuracy(3, average="none")
    assert m["per_class"] == pytest.approx(theirs(out.prediction, target).tolist(), rel=1e-6)
    sure = out.logits.softmax(1).amax(1) == 1
    assert sure.any()
    theirs = torchmetrics.classification.MulticlassCalibrationError(3, n_bins=15)
    theirs.update(out.logits[~sure].softmax(1), target[~sure])
    kept = out._replace(**{k: getattr(out, k)[~sure] for k in out._fields[:4]})
    assert computed(kept, target[~sure])["ece"] == pytest.approx(theirs.compute().item(), rel=1e-6)


def test_f1_agrees_with_torchmetrics():
    out, target = random_output(500, classes=5)
    target[target == 4] = 3  # a class that is predicted and has no sample
    theirs = torchmetrics.functional.classification.multiclass_f1_score(
        out.prediction, target, num_classes=5, average="macro"
    )
    assert computed(out, target, [9] * 5)["f1"] == pytest.approx(theirs.item(), rel=1e-6)
    never = out.prediction < 3
    kept = ELFOutput(*(t[never] for t in out[:4]), None)
    theirs = torchmetrics.functional.classification.multiclass_f1_score(
        kept.prediction, target[never].clamp(max=2), num_classes=5, average="macro"
    )
    m = computed(kept, target[never].clamp(max=2), [9] * 5)
    assert m["f1"] == pytest.approx(theirs.item(), rel=1e-6)


def test_confusions_are_the_cells_of_torchmetrics_matrix():
    out, target = random_output(400, classes=6)
    matrix = torchmetrics.functional.classification.multiclass_confusion_matrix(
        out.prediction, target, num_classes=6
    )
    found = computed(out, target, [9] * 6)["confusions"]
    off_diagonal = matrix.masked_fill(torch.eye(6, dtype=torch.bool), 0)
    assert [c["samples"] for c in found] == off_diagonal.flatten().sort().values.flip(0)[
        :10
    ].tolist()
    for c in found:
        assert c["samples"] == matrix[c["target"], c["prediction"]]
        assert c["share"] == pytest.approx(c["samples"] / matrix[c["target"]].sum().item())


def test_a_prior_weighs_classes_as_that_many_samples_would():
    """Against a part that holds every sample of class c as often as its weight says."""
    (out, target), counts = random_output(300), (500, 50, 5)
    copies = torch.tensor([1, 5, 2])[target]
    rows = torch.arange(300).repeat_interleave(copies)
    repeated = computed(ELFOutput(*(t[rows] for t in out[:4]), None), target[rows], counts)
    prior = torch.bincount(target[rows], minlength=3)
    weighed = computed(out, target, counts, prior=prior)
    plain = computed(out, target, counts)
    same = ("samples", "samples_by_group", "ece", "confusions", "per_class", "balanced_accuracy")
    for key in same:
        assert weighed[key] == plain[key]
        repeated.pop(key), weighed.pop(key)
    assert weighed["overall"] != pytest.approx(plain["overall"])
    for key, value in weighed.items():
        for name, of_group in (value if isinstance(value, dict) else {"": value}).items():
            theirs = repeated[key][name] if name else repeated[key]
            torch.testing.assert_close(torch.tensor(of_group), torch.tensor(theirs), msg=key)


def test_a_uniform_prior_makes_accuracy_the_balanced_one():
    out, target = random_output(300)
    m = computed(out, target, prior=[1, 1, 1])
    assert m["overall"] == pytest.approx(m["balanced_accuracy"])
    rows = target != 1
    m = computed(ELFOutput(*(t[rows] for t in out[:4]), None), target[rows], prior=[0.1, 0.8, 0.1])
    assert m["overall"] == pytest.approx(m["balanced_accuracy"])  # of the classes with samples
    m = computed(ELFOutput(*(t[rows] for t in out[:4]), None), target[rows], prior=[0, 1, 0])
    assert m["overall"] is None and m["flops_share"] is None and m["f1"] is None


@pytest.mark.parametrize("temperatures", [1.0, [0.5, 2.0, 3.0]])
def test_calibration_error_has_15_bins_and_follows_the_temperatures(temperatures):
    out, target = random_output(500)
    T = torch.as_tensor(temperatures).expand(3)[out.exit_index].double()
    p = (out.logits.double() / T[:, None]).softmax(1).amax(1)
    right = (out.prediction == target).double()
    bins = (15 * p).floor().clamp(max=14)
    expected = sum(abs((right[bins == b] - p[bins == b]).sum().item()) / len(p) for b in range(15))
    m = computed(out, target, temperatures=temperatures)
    assert m["ece"] == pytest.approx(expected, rel=1e-5)


def test_a_probability_of_1_shares_the_last_bin():
    right = output([0], [0], confidence=0.95)
    wrong = output([0], [0], confidence=1.0)
    both = ELFOutput(*(torch.cat(pair) for pair in zip(right[:4], wrong[:4], strict=True)), None)
    assert computed(both, [0, 1])["ece"] == pytest.approx(0.975 - 0.5)


def test_batches_add_up_in_any_mode_and_a_reset_forgets_them():
    out, target = random_output(100)
    whole = computed(out, target)
    metrics = ELFMetrics([500, 200, 5], FLOPS)
    for _ in range(2):
        for i, rows in enumerate(torch.arange(100).split(33)):
            with torch.inference_mode(i == 1):
                batch = ELFOutput(*(t[rows] for t in out[:4]), None)
                metrics.update(batch, target[rows])
        assert metrics.compute() == whole
        with torch.inference_mode():
            metrics.reset()
    assert json.loads(json.dumps(whole, allow_nan=False)) == whole


def test_a_nan_leaves_the_other_numbers_alone():
    out, target = random_output(10)
    expected = computed(out, target)
    assert expected.pop("ece") > 0
    right = (out.prediction == target).nonzero()[0]
    out.logits[right] = torch.nan
    m = computed(out, target)
    assert m.pop("ece") is None and m == expected


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: class_groups([]), ValueError, r"class_counts: expected \[C\] .* at least 0"),
        (lambda: ELFMetrics([5, 5], FLOPS, temperatures=[1.0, 2.0]), ValueError,
         "temperatures: expected a number or 3, one per exit"),
        (lambda: ELFMetrics([5, 5], FLOPS, temperatures=0.0), ValueError, "temperatures: .*got 0"),
        (lambda: ELFMetrics([5, 5], FLOPS, prior=[1.0]), ValueError,
         r"prior: expected \[2\] finite weights of at least 0, not all 0, got"),
        (lambda: ELFMetrics([5, 5], FLOPS, prior=[0, 0]), ValueError, "prior: .* not all 0"),
        (lambda: ELFMetrics([5, 5], FLOPS, prior=[2, -1]), ValueError, "prior: .* at least 0"),
        (lambda: computed(output([0], [0]), [0], [5, 5]), ValueError,
         r"out: expected logits \[n, 2\], got \[1, 3\]"),
        (lambda: computed(output([0], [3]), [0]), ValueError, "out: .*exit_index < 3.*got 3"),
        (lambda: computed(output([0], [0]), [3]), ValueError, "target: expected 0 <= target < 3"),
        (lambda: computed(output([0], [0]), [0, 1]), ValueError, r"target: expected shape \[1\]"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Ranks


def _evaluate_share(rank, folder):
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
        timeout=timedelta(minutes=2),
    )  # fmt: skip
    for n in (41, 1):  # shares of different length, and a rank without samples
        out, target = random_output(n)
        rows = list(EvaluationSampler(n))
        metrics = ELFMetrics([500, 200, 5], FLOPS)
        if rows:
            metrics.update(ELFOutput(*(t[rows] for t in out[:4]), None), target[rows])
        (folder / f"{n}-{rank}.json").write_text(json.dumps(metrics.compute()))
    distributed.destroy_process_group()


def test_ranks_together_compute_what_one_process_does(tmp_path):
    other = multiprocessing.get_context("spawn").Process(target=_evaluate_share, args=(1, tmp_path))
    other.start()
    _evaluate_share(0, tmp_path)
    other.join()
    assert other.exitcode == 0
    for n in (41, 1):
        alone = computed(*random_output(n))
        for rank in range(2):
            shared = json.loads((tmp_path / f"{n}-{rank}.json").read_text())
            # The order of the sum in the calibration error is another one.
            assert shared.pop("ece") == pytest.approx(alone["ece"], rel=1e-5)
            assert shared == {key: value for key, value in alone.items() if key != "ece"}


def test_import_of_the_package_leaves_torchmetrics_alone():
    code = "import sys, elf_fast; sys.exit('torchmetrics' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
