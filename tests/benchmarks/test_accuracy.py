"""The accuracy benchmark: paired runs, a results file that survives, statistics, the page."""

from __future__ import annotations

import math
import re

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("torchmetrics")

from PIL import Image
from scipy import stats
from torch import nn

from benchmarks.accuracy import cifar, comparisons, page, paired, results, run, runs, trial
from benchmarks.accuracy.runs import Run
from elf_fast import losses
from elf_fast.classifiers import CosineClassifier
from elf_fast.data.digits import augment
from elf_fast.flops import count_flops
from elf_fast.training import demo
from elf_fast.training.loop import EpochStats, Schedule, train

BRIEF = Schedule(epochs=1)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with demo.one_thread():
        yield


def variants(**fields) -> dict[str, Run]:
    return {
        name: Run(
            **{"imbalance": 100, "loss": "ce", "head": "conv", "seed": 3, **fields}, variant=name
        )
        for name in runs.VARIANTS
    }


# Pairing


@pytest.mark.parametrize("loss", ["ce", "ldam_drw"])
@pytest.mark.parametrize("head", runs.CONVOLUTIONS)
def test_variants_start_from_the_same_weights(loss, head):
    models = {
        name: trial.build(r, [9, 5, 1], epochs=1)
        for name, r in variants(loss=loss, head=head).items()
    }
    keep = models.pop("keep")
    plain = models.pop("plain")
    stages = nn.Sequential(*keep.stages).state_dict()
    assert plain.stages[0].state_dict().keys() == stages.keys()
    for name, value in plain.stages[0].state_dict().items():
        assert torch.equal(value, stages[name])
    for name, value in plain.heads[0].state_dict().items():
        assert torch.equal(value, keep.heads[-1].state_dict()[name])
    weights = dict(keep.named_parameters())
    for model in models.values():
        for name, value in model.named_parameters():
            assert torch.equal(value, weights[name])
    other = trial.build(variants(loss=loss, head=head, seed=4)["keep"], [9, 5, 1], epochs=1)
    assert not torch.equal(next(other.parameters()), next(keep.parameters()))


def test_variants_see_the_same_samples_in_the_same_order(monkeypatch):
    batches: list[torch.Tensor] = []

    def watched(images, generator):
        batches.append(augment(images, generator))
        return batches[-1]

    monkeypatch.setattr("elf_fast.training.loop.augment", watched)
    seen = {}
    for name, r in variants().items():
        if name in runs.TABLE:
            batches.clear()
            data = trial.split(r.imbalance, r.seed)
            train(trial.build(r, data.class_counts, 1), data.train, BRIEF, seed=r.seed)
            seen[name] = torch.cat(batches)
    assert len(seen["plain"]) == 254
    assert torch.equal(seen["plain"], seen["keep"]) and torch.equal(seen["plain"], seen["drop"])


def test_a_seed_has_its_own_digits_for_every_imbalance():
    at_100, at_10, other = trial.split(100, 0), trial.split(10, 0), trial.split(100, 1)
    assert torch.equal(at_100.test.position, at_10.test.position)
    assert at_100.class_names == at_10.class_names != other.class_names
    assert set(at_100.test.position.tolist()) != set(other.test.position.tolist())


# One run


def test_losses_and_temperatures_are_those_of_the_method():
    model = trial.build(variants(loss="ldam_drw")["keep"], [9, 5, 1], epochs=10)
    assert isinstance(model.exit_loss, losses.DeferredReweighting)
    assert model.exit_loss.start_epoch == 8 and model.exit_loss.scale == 30
    assert model.temperatures.tolist() == pytest.approx([1 / 30, 1 / 30])
    assert all(isinstance(head.classifier, CosineClassifier) for head in model.heads)
    model = trial.build(variants(loss="balanced_softmax")["keep"], [9, 5, 1], epochs=10)
    assert isinstance(model.exit_loss, losses.BalancedSoftmaxLoss)
    assert model.temperatures.tolist() == [1, 1]


def test_logit_adjustment_in_the_loss_is_balanced_softmax():
    """Why the table has logit adjustment post hoc only."""
    z = torch.randn(20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(20) % 5
    counts = [50, 20, 8, 3, 1]
    torch.testing.assert_close(
        losses.LogitAdjustedLoss(counts)(z, y), losses.BalancedSoftmaxLoss(counts)(z, y)
    )


@pytest.fixture(scope="module")
def record():
    """Of a run with LDAM-DRW: exits, cosines, temperatures."""
    return trial.perform(variants(loss="ldam_drw")["keep"], BRIEF)


def test_a_run_repeats(record):
    again = trial.perform(variants(loss="ldam_drw")["keep"], BRIEF)
    for either in (record, again):
        assert either["seconds"] > 0 and either["environment"]["threads"] == "1"
    varies = {"seconds", "environment"}
    assert {k: v for k, v in record.items() if k not in varies} == {
        k: v for k, v in again.items() if k not in varies
    }


def test_a_record_has_every_figure_at_every_operating_point(record):
    assert set(record["test"]) == {"full", "safe", "best"}
    assert record["class_counts"] == [104, 62, 37, 22, 13, 8, 4, 2, 1, 1]
    assert record["thresholds"]["full"] is None
    assert record["test"]["full"]["exit_shares"] == [0, 0, 1]
    assert record["test"]["full"]["flops_share"] > 1  # the heads
    for point in record["test"].values():
        assert set(point) == set(trial.KEPT)
        assert point["overall"] * 500 == pytest.approx(
            50 * point["many"] + 150 * point["medium"] + 300 * point["few"], abs=0.01
        )
    assert record["test"]["best"]["flops_share"] < record["test"]["full"]["flops_share"]
    assert record["validation"]["safe"] >= record["validation"]["full"]
    assert record["validation"]["best"] >= record["validation"]["safe"]


def test_what_changes_during_training(monkeypatch):
    """DRW's weights come in for the last fifth; drop-late opens its exits at the half."""
    even, thresholds = [], []

    def without_training(model, data, schedule, *, seed, on_epoch):
        history = [EpochStats(epoch, 1.0, 0.5, [1.0]) for epoch in range(1, schedule.epochs + 1)]
        for epoch in history:
            even.append(bool((model.exit_loss.weight == 1).all()))
            thresholds.append(model.train_thresholds[0, 0].item())
            on_epoch(epoch)
        return history

    monkeypatch.setattr(trial, "train", without_training)
    trial.perform(variants(loss="ldam_drw")["drop-late"], Schedule(epochs=5))
    assert even == [True] * 4 + [False]
    assert thresholds == pytest.approx([math.inf] * 3 + [0.9] * 2)


def test_margins_are_in_the_test_where_they_should_be():
    models = {
        name: trial.build(variants(loss="ldam_drw")[name], [90, 30, 2], epochs=1)
        for name in ("keep", "keep-margin")
    }
    assert torch.equal(models["keep"].train_thresholds, torch.full((2, 3), 0.9))
    wanted = models["keep-margin"].exit_loss.margin_thresholds([0.9, 0.9])
    assert torch.equal(models["keep-margin"].train_thresholds, wanted)


@pytest.mark.parametrize("head, strides", [("pooled", []), ("conv", [2]), ("deep", [2, 1])])
def test_heads_have_their_convolutions(head, strides):
    model = trial.build(variants(head=head)["keep"], [9, 5, 1], epochs=1)
    for part in model.heads:
        found = [m.stride[0] for m in part.modules() if isinstance(m, nn.Conv2d)]
        assert found == strides
    assert model.eval()(torch.rand(8, 1, 16, 16)).logits.shape == (8, 3)


def test_a_softened_test_reads_the_logits_at_a_third_of_the_scale():
    model = trial.build(variants(loss="ldam_drw")["keep-soft"], [9, 5, 1], epochs=1)
    assert model.temperatures.tolist() == pytest.approx([0.1, 0.1])
    assert model.exit_loss.scale == 30


def test_batch_norm_rests_on_small_batches():
    model = trial.build(variants()["drop-rest"], [9, 5, 1], epochs=1).train()
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    x = torch.randn(32, norm.num_features, 4, 4)
    before = norm.running_mean.clone()
    torch.testing.assert_close(norm(x[:31]), norm.eval()(x[:31]))
    assert torch.equal(norm.running_mean, before)
    assert norm.train()(x).mean().abs() < 1e-5 and not torch.equal(norm.running_mean, before)
    norm(x[:31])
    assert norm.training


def test_post_hoc_logit_adjustment_moves_every_exit_towards_the_tail(monkeypatch):
    monkeypatch.setattr(trial, "train", lambda *_, **__: [EpochStats(1, 1.0, 0.5, [1.0])])
    adjusted = []

    def watched(model, sample):
        adjusted.append(model)
        return count_flops(model, sample)

    monkeypatch.setattr(trial, "count_flops", watched)
    r = variants(loss="logit_adjustment")["keep"]
    trial.perform(r, BRIEF)
    counts = torch.tensor([104, 62, 37, 22, 13, 8, 4, 2, 1, 1.0])
    before = trial.build(r, counts.int().tolist(), 1)
    for head, start in zip(adjusted[0].heads, before.heads, strict=True):
        shift = head.classifier.bias - start.classifier.bias
        torch.testing.assert_close(shift, -(counts / counts.sum()).log())


# The results file


def a_record(**fields) -> dict:
    return {"test": {"full": {"overall": 0.5}}, "seconds": 1.0, **fields}


RUNS = list(variants().values())[:3]


def test_the_file_is_sorted_whatever_the_order(tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    for r in RUNS:
        results.add(r, a_record(), one)
    for r in reversed(RUNS):
        results.add(r, a_record(), two)
    results.add(RUNS[0], a_record(seconds=9.0), two)  # there: stays
    assert one.read_bytes() == two.read_bytes()
    assert sorted(RUNS) == list(results.load(one))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.jsonl", "two.jsonl"]


def test_a_torn_last_line_is_done_again(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    for r in RUNS:
        results.add(r, a_record(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    last = sorted(RUNS)[-1]
    assert run.missing(RUNS, path) == [last]
    assert f"{path}:3: cut short" in capsys.readouterr().err
    results.add(last, a_record(), path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda lines: ["{", *lines], ":1: expected the record of a run, got '{"),
        (lambda lines: ['{"run": {"loss": "ce"}}', *lines], ":1: expected the record of a run"),
        (lambda lines: [*lines, lines[0]], ":4: expected one record a run, got a second of ce"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, damage, message):
    path = tmp_path / "results.jsonl"
    for r in RUNS:
        results.add(r, a_record(), path)
    path.write_text("\n".join(damage(path.read_text().splitlines())) + "\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        results.load(path)


# The command


def test_what_is_there_is_not_run_again(tmp_path, monkeypatch, capsys):
    done = []

    def pretend(r):
        done.append(r)
        return a_record()

    monkeypatch.setattr(trial, "perform", pretend)
    output = tmp_path / "results.jsonl"
    results.add(Run(50, "ce", "conv", "keep", 1), a_record(), output)
    filters = ["--only", "imbalance=50", "--only", "loss=ce", "--only", "head=conv"]
    filters += ["--only", "variant=plain,keep,drop"]
    run.main([*filters, "--only", "seed=0,1", "--output", str(output)])
    assert [(r.seed, r.variant) for r in done] == [
        (0, "plain"), (0, "keep"), (0, "drop"), (1, "plain"), (1, "drop"),
    ]  # fmt: skip
    run.main([*filters, "--only", "seed=0,1", "--output", str(output)])
    assert len(done) == 5 and len(results.load(output)) == 6
    assert "0 runs are missing" in capsys.readouterr().out
    run.main([*filters, "--only", "seed=2", "--limit-minutes", "0", "--output", str(output)])
    assert len(done) == 5 and "3 runs are missing" in capsys.readouterr().out


def test_cifar_runs_go_through_the_trainer(tmp_path, monkeypatch, capsys):
    pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy()
    for part, count in (("train", 20), ("test", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for k in range(count):
                Image.fromarray(pixels).save(folder / f"{k}.png")
    monkeypatch.setattr(cifar, "SETTINGS", [*cifar.SETTINGS, "--no-amp"])
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
    run.main(command)  # what has been trained is read
    assert {r.variant: record for r, record in results.load(output).items()} == records
    with pytest.raises(SystemExit):
        run.main(["--work", str(tmp_path)])
    assert "--cifar10, --work: expected both or neither" in capsys.readouterr().err


def test_jobs_are_processes_and_give_the_same():
    begun = []

    def in_time() -> bool:
        begun.append(len(begun))
        return True

    for jobs in (1, 2):
        begun.clear()
        records = run.finished(RUNS, jobs, in_time, str)
        first = next(records)
        assert len(begun) == jobs
        assert sorted([first, *records]) == [(r, str(r)) for r in sorted(RUNS)]


@pytest.mark.parametrize(
    "text, message",
    [
        ("los=ce", "expected imbalance|loss|head|variant|seed=value,..., got 'los=ce'"),
        ("seed=3,99", "expected values of seed among 0, 1"),
    ],
)
def test_filters_say_what_they_know(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        runs.select(runs.table(), [text])


def test_the_table_has_no_run_twice_and_all_that_is_asked():
    table = runs.table()
    assert len(set(table)) == len(table)
    seeds = "seed=" + ",".join(map(str, runs.SEEDS))
    main = runs.select(table, ["variant=plain,keep,drop", "head=conv,pooled", seeds])
    assert len(main) == 3 * 4 * 2 * 3 * 10
    assert {r.seed for r in runs.select(table, ["variant=keep-margin"])} == set(range(30))


# Statistics


def test_intervals_are_students():
    rng = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 10, dtype=torch.float64, generator=rng).tolist()
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    got = paired.difference(ours, theirs)
    assert got == pytest.approx((sum(ours) / 10 - sum(theirs) / 10, *expected))
    # by hand: mean 2, s = 1, t_{0.975, 2} = 4.302653, so 2 -+ 4.302653 / sqrt(3)
    assert paired.difference([2, 3, 4], [1, 1, 1]) == pytest.approx((2, -0.484138, 4.484138))
    with pytest.raises(ValueError, match="at least 3, got 3 and 2"):
        paired.difference([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="at least 3, got 2 and 2"):
        paired.difference([1, 2], [1, 2])


# The page


def made_up(setting: tuple[int, str, str], gains: dict[str, float], seeds=runs.SEEDS, flops=0.7):
    """Records in which a variant gains so many points over a network without exits, whose accuracy
    moves from seed to seed; the gain moves, too, by a tenth."""
    records = {}
    for variant, gain in gains.items():
        for seed in seeds:
            overall = 0.6 + 0.02 * seed + (gain + (0.1 if seed % 2 else -0.1)) / 100
            if variant == "plain":
                overall = 0.6 + 0.02 * seed
            shares = [1.0] if variant == "plain" else [0.25, 0.25, 0.5]
            figures = {
                **dict.fromkeys(("many", "medium", "few"), overall),
                "overall": overall,
                "ece": 0.1,
                "exit_shares": shares,
                "exit_shares_by_group": {"few": shares},
                "early_wrong": 0.02,
                "early_wrong_by_group": {"few": 0.01},
                "flops_share": 1.0 if variant == "plain" else flops,
            }
            points = ("full",) if variant == "plain" else ("full", "safe", "best")
            records[Run(*setting, variant, seed)] = {
                "test": dict.fromkeys(points, figures),
                "seconds": 10.0,
                "environment": {"torch": "2", "cpu": "a", "threads": "1"},
            }
    return records


def test_verdicts_follow_the_whole_interval():
    gains = {"plain": 0.0, "keep": 4.0, "drop": -2.0}
    records = made_up((100, "ce", "conv"), gains)
    (keep,) = comparisons.compare(records, "keep", "plain", point="best")
    half = stats.t.ppf(0.975, 9) * torch.tensor([0.1, -0.1] * 5).std().item() / math.sqrt(10)
    assert keep.difference == pytest.approx((4.0, 4.0 - half, 4.0 + half))
    assert keep.accuracy == pytest.approx((73.0, 69.0))
    assert comparisons.claim(keep) == "holds"
    assert comparisons.claim(keep._replace(flops_share=0.81)) == "fails"
    for interval, verdict in (((3.5, 2.9, 4.1), "open"), ((2.0, 1.0, 2.9), "fails")):
        there = keep._replace(difference=paired.Difference(*interval))
        assert comparisons.claim(there) == verdict
    for low, high, verdict in ((-0.4, 0.9, "none"), (-2, -0.1, "some"), (-2, 1, "open")):
        assert comparisons.harm(paired.Difference((low + high) / 2, low, high)) == verdict


def test_all_settings_together_count_a_seed_once():
    records = made_up((100, "ce", "conv"), {"plain": 0.0, "keep": 4.0})
    assert comparisons.together(records, "keep", "plain", point="best") is None
    records |= made_up((50, "ce", "conv"), {"plain": 0.0, "keep": 1.0})
    records |= made_up((10, "ce", "conv"), {"plain": 0.0, "keep": 9.0}, seeds=range(9))
    settings, difference = comparisons.together(records, "keep", "plain", point="best")
    assert settings == 2 and difference.mean == pytest.approx(2.5)
    # Both settings move alike with the seed: averaging them narrows nothing.
    one = comparisons.compare(records, "keep", "plain", point="best")[0].difference
    assert difference.high - difference.low == pytest.approx(one.high - one.low)
    records |= made_up((100, "ce", "pooled"), {"plain": 0.0, "keep": -7.0})
    records |= made_up((100, "ce", "deep"), {"plain": 0.0, "keep": 99.0})  # not of the table
    by_heads = {
        heads: comparisons.together(records, "keep", "plain", point="best", heads=heads)
        for heads in (runs.HEADS, ("conv",), ("pooled",))
    }
    assert by_heads[runs.HEADS][0] == 3
    assert by_heads[runs.HEADS][1].mean == pytest.approx(-2 / 3)
    assert by_heads["conv",] == (2, difference) and by_heads["pooled",] is None


def rows(text: str, heading: str) -> list[list[str]]:
    section = text[text.index(heading) :].split("\n## ")[0].split("\n\n")
    lines = next(part for part in section if part.startswith("| ")).splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_says_what_the_results_say(tmp_path):
    records = {
        **made_up((100, "ce", "conv"), {"plain": 0, "keep": 4, "drop": -2, "stay": 1}),
        **made_up((50, "ldam_drw", "pooled"), {"plain": 0, "keep": 3.5, "drop": 3.4}, flops=0.6),
        **made_up((10, "ce", "conv"), {"plain": 0, "keep": 1}, seeds=range(2)),
        **made_up((100, "ce", "deep"), {"plain": 0, "keep": 5}),
        **made_up((100, "ce", "conv"), {"plain": 0, "stay": 0.5}, seeds=runs.NEW_SEEDS),
    }
    on_cifar10 = made_up((100, "ce", "conv"), {"plain": 0, "keep": 2}, seeds=range(3))
    for made in on_cifar10.values():
        (figures, *_) = made["test"].values()
        made["test"] = {key: {**figures, "few": None} for key in ("full", "chosen", "best")}
    path, output = tmp_path / "results.jsonl", tmp_path / "accuracy.md"
    cifar10 = tmp_path / "cifar10.jsonl"
    for r, made in records.items():
        results.add(r, made, path)
    for r, made in on_cifar10.items():
        results.add(r, made, cifar10)
    page.main(["--results", str(path), "--cifar10-results", str(cifar10), "--output", str(output)])
    said = output.read_text(encoding="utf-8")
    assert "is reached for two losses: of 4 comparisons it holds in 3 (LDAM-DRW, cross" in said
    assert "It is less accurate than the network without exits, beyond chance, in 1 of 4" in said
    assert "harmless (the interval ends above -0.5) in 1 of 2 comparisons, harmful in 1" in said
    assert "Over the 2 settings that have all seeds, dropping differs from keeping by -3." in said
    assert "Of 2 comparisons of what else was tried with the network without exits, 2 gain" in said
    assert "+5.0 [+4.9, +5.1] points (cross-entropy at 100; two-convolution head, kept)" in said
    against = rows(said, "## ELF against")
    assert [row[:5] for row in against] == [
        ["cross-entropy", "100", "convolution", "10", "dropped"],
        ["LDAM-DRW", "50", "pool", "10", "dropped"],
        ["LDAM-DRW", "50", "pool", "10", "kept"],
        ["cross-entropy", "100", "convolution", "10", "kept"],
    ]
    assert against[0][5:] == ["69.0%", "67.0%", "-2.0 [-2.1, -1.9]", "70%", "fails"]
    assert [row[-2:] for row in against[1:]] == [["60%", "holds"]] * 2 + [["70%", "holds"]]
    assert rows(said, "## Dropping")[0][-1] == "some"
    assert [[row[0], *row[3:]] for row in rows(said, "## What else")] == [
        ["kept", "two-convolution", "10", "69.0%", "74.0%",
         "+5.0 [+4.9, +5.1]", "70%", "holds", "", "+5.0 [+4.9, +5.1]"],
        ["kept, none leaves in training", "convolution", "10", "69.0%", "70.0%",
         "+1.0 [+0.9, +1.1]", "70%", "fails", "-3.0 [-3.0, -3.0]", "+1.0 [+0.9, +1.1]"],
    ]  # fmt: skip
    figures = rows(said, "## All figures")
    (new,) = rows(said, "### On new seeds")
    assert new[3] == "20" and new[7] == "+0.5 [+0.5, +0.5]"
    assert "kept, none leaves in training: +0.5 [+0.5, +0.5]." in said
    assert len(figures) == 9  # the setting of two seeds is left out
    assert figures[0][:6] == ["LDAM-DRW", "50", "pool", "10", "without exits", "69.0 ± 6.1"]
    assert "134 of the" in said
    (row,) = rows(said, "## CIFAR-10-LT")
    assert row[3:6] == ["3", "62.0%", "64.0%"] and row[9:12] == ["", "70%", "fails"]


def test_one_loss_is_not_two(tmp_path):
    records = made_up((100, "ce", "conv"), {"plain": 0, "keep": 4})
    assert "NOT reached for two losses: of 1 comparisons it holds in 1" in page.page(records, {})


def test_a_page_of_nothing_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        page.main(["--results", str(tmp_path / "none.jsonl")])
    assert "--results: expected finished runs, found none" in capsys.readouterr().err
