"""`Monitor`: shifted traffic raises an alarm, clean traffic does not, and what it reports."""

from __future__ import annotations

import json
import re
import threading

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d

from elf_fast import ELFOutput
from elf_fast.data import long_tailed_digits
from elf_fast.demo import network
from elf_fast.demo.loop import Schedule, train
from elf_fast.policy import ExitTable, Monitor, Policy, Promise, drift
from elf_fast.policy.exit_table import exit_table
from elf_fast.policy.measure import measured
from elf_fast.policy.monitor import _sums

BATCH = 64


def policy_of(table: ExitTable, thresholds: torch.Tensor) -> Policy:
    return Policy(
        criterion=table.criterion.name,
        thresholds=tuple(thresholds.tolist()),
        temperatures=(1.0,) * len(thresholds),
        promise=Promise("accuracy"),
        measured=measured(table, thresholds),
        data_digest=table.digest(),
    )


def traffic(N: int, seed: int, *, criterion: str = "confidence", sure: float = 1.0) -> ExitTable:
    """Three exits, ten classes; the true class stands out by a random amount times `sure`."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 10, (N,), generator=generator)
    logits = torch.randn(3, N, 10, generator=generator)
    ease = 1 + 5 * torch.rand(N, generator=generator) * sure
    logits[:, torch.arange(N), target] += ease * torch.tensor([[0.8], [1.0], [1.3]])
    return ExitTable.from_logits(logits, target, criterion=criterion)


def taken(table: ExitTable, policy: Policy) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(exit_index, statistic there, accuracy) of all samples."""
    e = table.exit_index(torch.tensor(policy.thresholds))[None]
    right = table.correct.gather(0, e).double().mean().item()
    return e[0], table.statistic.gather(0, e)[0], right


def filled(policy: Policy, table: ExitTable, **options) -> Monitor:
    monitor = Monitor(policy, **options)
    e, s, _ = taken(table, policy)
    for rows in torch.arange(len(e)).split(BATCH):
        monitor.update(exit_index=e[rows], confidence=s[rows])
    return monitor


@pytest.fixture(scope="module")
def policy() -> Policy:
    return policy_of(traffic(4000, 0), torch.tensor([0.9, 0.8]))


def test_clean_traffic_raises_no_alarm_in_10_000_batches(policy):
    """The alarm is asked for whenever the window has moved: after four batches."""
    e, s, _ = taken(traffic(64_000, 1), policy)
    monitor = Monitor(policy)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, len(e), (10_000, BATCH), generator=generator)
    alarms, highest = set(), 0.0
    for i in range(10_000):
        monitor.update(exit_index=e[rows[i]], confidence=s[rows[i]])
        if i % 4 == 3:
            found = monitor.report()
            alarms.add(found["alarm"])
            highest = max(highest, found["psi"] / found["psi_limit"])
    assert alarms == {None} and found["seen"] == 640_000 and found["samples"] == 2560
    assert 0.2 < highest < 1


def test_fresh_traffic_raises_alarms_as_often_as_stated():
    """Calibration data and windows drawn anew, at one alarm in ten windows at most. Both limits are
    cautious, so there are fewer."""
    alarms = 0
    for seed in range(200):
        made = policy_of(traffic(600, 2 * seed), torch.tensor([0.9, 0.8]))
        found = filled(made, traffic(640, 2 * seed + 1), window=640, samples_per_false_alarm=640)
        alarms += found.alarm is not None
    assert 1 <= alarms <= 20


@pytest.mark.parametrize(
    "p, n, N",
    [((0.5, 0.3, 0.2), 2000, 1000), ((0.97, 0.02, 0.01), 500, 5000), ((0.9, 0.1), 2000, 150),
     ((0.99, 0.005, 0.004, 0.001), 10_000, 2000), ((0.995, 0.005), 10_000, 2000)],
)  # fmt: skip
def test_the_limit_of_the_index_holds_for_small_shares(p, n, N):
    draw = np.random.default_rng(0)
    pairs = draw.multinomial(n, p, 200_000) + 1.0, draw.multinomial(N, p, 200_000) + 1.0
    q, r = (k / k.sum(1, keepdims=True) for k in pairs)
    index = ((q - r) * np.log(q / r)).sum(1)
    assert index[0] == pytest.approx(drift.psi(pairs[0][0] - 1, pairs[1][0] - 1))
    alpha = 1e-3
    assert (index > drift.psi_limit(n, N, len(p), alpha)).mean() <= alpha
    assert (index > drift.psi_limit(n, N, len(p), 0.2)).mean() > 0.005  # no limit out of reach


def test_the_limit_of_the_mean_holds():
    draw = np.random.default_rng(0)
    n, N, p, alpha = 200, 100, 0.9, 1e-2
    falls = draw.binomial(N, p, 200_000) / N - draw.binomial(n, p, 200_000) / n
    limit = drift.fall_limit(p * (1 - p), n, N, 1.0, alpha)
    assert 0 < (falls > limit).mean() <= alpha


@pytest.mark.parametrize("degrees, alpha, x", [(1, 0.05, 3.8415), (3, 0.01, 11.3449),
                                               (4, 1e-6, 33.3768)])  # fmt: skip
def test_quantiles_of_chi_square(degrees, alpha, x):
    assert drift.chi_square_quantile(degrees, alpha) == pytest.approx(x, abs=1e-3)


@pytest.mark.parametrize("criterion, at", [("confidence", 0.9), ("margin", 0.8), ("entropy", 0.2)])
def test_less_sure_traffic_raises_an_alarm(criterion, at):
    made = policy_of(traffic(4000, 0, criterion=criterion), torch.tensor([at, at]))
    assert filled(made, traffic(3000, 1, criterion=criterion)).alarm is None
    alarm = filled(made, traffic(3000, 2, criterion=criterion, sure=0.5)).alarm
    assert re.search(r"the exits taken differ .* left at exit \d instead of", alarm)
    assert re.search(rf"less sure than in calibration: mean {criterion} 0\.\d+ over", alarm)


def test_a_shift_of_the_prior_raises_an_alarm():
    """Some classes are easy and leave early; they become rarer."""

    def of_classes(easy: float, seed: int) -> ExitTable:
        """4000 samples, of which a share `easy` is of the classes 0 to 4."""
        hard_table, easy_table = traffic(8000, seed, sure=0.5), traffic(8000, seed + 50)
        hard = (hard_table.target >= 5).nonzero()[: round(4000 * (1 - easy)), 0]
        simple = (easy_table.target < 5).nonzero()[: round(4000 * easy), 0]
        mixed = ExitTable.joined([hard_table.rows(hard), easy_table.rows(simple)])
        return mixed.rows(torch.randperm(4000, generator=torch.Generator().manual_seed(seed)))

    made = policy_of(of_classes(0.7, 0), torch.tensor([0.9, 0.8]))
    assert filled(made, of_classes(0.7, 1)).alarm is None
    assert "the exits taken differ" in filled(made, of_classes(0.4, 2)).alarm


def test_the_estimated_accuracy_follows_the_accuracy(policy):
    """Nobody knows the labels; the estimate is close, and its interval covers clean traffic."""
    covered = 0
    for seed in range(40):
        table = traffic(2560, 100 + seed)
        found = filled(policy, table, window=2560).report()["estimated_accuracy"]
        covered += found["low"] <= taken(table, policy)[2] <= found["high"]
    assert covered >= 34
    shifted = traffic(2560, 7, sure=0.5)
    found = filled(policy, shifted, window=2560).report()
    right = taken(shifted, policy)[2]
    usual = found["calibration_accuracy"]
    assert abs(found["estimated_accuracy"]["value"] - right) < usual - right > 0.05


def test_other_criteria_estimate_by_the_exits_taken():
    made = policy_of(traffic(4000, 0, criterion="margin"), torch.tensor([0.8, 0.8]))
    found = filled(made, traffic(2560, 1, criterion="margin"), window=2560).report()
    shares = [x["share"] for x in found["exits"]]
    expected = sum(q * x.accuracy.value for q, x in zip(shares, made.measured.exits, strict=True))
    assert found["estimated_accuracy"]["value"] == pytest.approx(expected)


def test_blurred_digits_raise_an_alarm():
    """On a trained network. Half of the images that it has not seen are calibration data."""
    digits = long_tailed_digits(10.0)
    torch.manual_seed(0)
    model = network.with_exits(10, widths=(8, 16, 16), thresholds=0.8, drop_exited=False)
    train(model, digits.train, Schedule(epochs=8, learning_rate=1e-2), seed=0)
    images = torch.cat([digits.validation.images, digits.test.images])
    target = torch.cat([digits.validation.targets, digits.test.targets])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    calibration, new = order.chunk(2)
    table = exit_table(model, [(images[calibration], target[calibration])])
    made = policy_of(table, model.thresholds)

    def watched(x: torch.Tensor) -> Monitor:
        monitor = Monitor(made, window=300)
        with torch.inference_mode():
            for batch in x.split(30):
                monitor.update(model.eval()(batch))
        return monitor

    def blurred(x: torch.Tensor) -> torch.Tensor:
        return avg_pool2d(x, 3, stride=1, padding=1)

    clean = watched(images[new])
    assert clean.report()["samples"] == 300 and clean.alarm is None
    assert "the exits taken differ" in watched(blurred(blurred(images[new]))).alarm


def test_the_window_forgets(policy):
    monitor = filled(policy, traffic(3000, 1, sure=0.3))
    assert monitor.alarm is not None
    e, s, _ = taken(traffic(3000, 2), policy)
    monitor.update(exit_index=e[:1000], confidence=s[:1000])
    assert monitor.alarm is not None
    for rows in torch.arange(1000, 3000).split(100):
        monitor.update(exit_index=e[rows], confidence=s[rows])
    monitor.update(exit_index=e[:200], confidence=s[:200])
    for _ in range(9):
        monitor.update(exit_index=e[:200], confidence=s[:200])
    assert monitor.report()["samples"] == 2000


def test_there_is_no_alarm_before_the_window_is_full(policy):
    monitor = Monitor(policy, window=1000)
    assert monitor.report() == {"seen": 0, "window": 1000, "samples": 0, "alarm": None}
    e, s = torch.full((100,), 2), torch.full((100,), 0.2)
    for moved in range(9):
        monitor.update(exit_index=e, confidence=s)
        assert monitor.alarm is None and monitor.report()["samples"] == 100 * (moved + 1)
    monitor.update(exit_index=e, confidence=s)
    assert monitor.alarm is not None


def test_nan_raises_an_alarm(policy):
    table = traffic(2000, 1)
    e, s, _ = taken(table, policy)
    s[::500] = torch.nan
    monitor = Monitor(policy)
    for rows in torch.arange(2000).split(200):
        monitor.update(exit_index=e[rows], confidence=s[rows])
    assert monitor.alarm == "4 of 2,000 samples have a confidence of NaN or infinity"


def test_kinds_of_input_count_the_same(policy):
    e, s, _ = taken(traffic(2000, 1), policy)
    empty = torch.empty(0)
    given = [
        {"exit_index": e, "confidence": s},
        {"exit_index": e.numpy(), "confidence": s.numpy()},
        {"exit_index": e.tolist(), "confidence": s.tolist()},
        {"exit_index": e.to(torch.uint8), "confidence": s.double()},
        {"output": ELFOutput(empty, empty, s.requires_grad_(), e, None)},
    ]
    reports = []
    for arguments in given:
        monitor = Monitor(policy)
        monitor.update(exit_index=[], confidence=[])
        monitor.update(**arguments)
        reports.append(monitor.report())
    assert all(found == reports[0] for found in reports) and reports[0]["samples"] == 2000


def test_workers_are_merged(policy):
    tables = [traffic(1280, seed) for seed in (1, 2, 3)]
    monitors = [filled(policy, table, window=640) for table in tables]
    states = json.loads(json.dumps([monitor.state() for monitor in monitors]))
    merged = Monitor.merged(policy, states).report()
    parts = [monitor.report() for monitor in monitors]
    assert merged["window"] == 1920 and merged["seen"] == 3840
    assert merged["samples"] == sum(found["samples"] for found in parts)
    counts = [sum(found["exits"][e]["share"] * found["samples"] for found in parts)
              for e in range(3)]  # fmt: skip
    shares = [found["share"] for found in merged["exits"]]
    assert shares == pytest.approx([k / merged["samples"] for k in counts])
    assert merged["alarm"] is None
    young = filled(policy, traffic(256, 9, sure=0.1), window=640)
    both = Monitor.merged(policy, [states[0], young.state()]).report()
    assert both["samples"] == 9 * 64 + 256 and both["psi"] > both["psi_limit"]
    assert both["alarm"] is None  # not full yet
    off = filled(policy, traffic(1280, 9, sure=0.1), window=640)
    assert Monitor.merged(policy, [*states, off.state()]).alarm is not None


def test_threads_may_update_at_once(policy):
    monitor = Monitor(policy, window=100_000)
    e, s = torch.tensor([0, 1, 2]), torch.tensor([0.9, 0.8, 0.7])

    def work() -> None:
        for _ in range(2000):
            monitor.update(exit_index=e, confidence=s)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = monitor.report()
    assert found["seen"] == 24_000 and found["samples"] in range(20_000, 20_010)


def test_metrics_have_names_of_prometheus(policy):
    found = filled(policy, traffic(3000, 1)).metrics()
    pattern = re.compile(r'elf_fast_drift_[a-z_]+(\{exit="[1-3]"\})?')
    assert all(pattern.fullmatch(name) and type(v) is float for name, v in found.items())
    assert found["elf_fast_drift_alarm"] == 0.0 and found["elf_fast_drift_psi"] > 0
    assert sum(found[f'elf_fast_drift_exit_share{{exit="{e}"}}'] for e in (1, 2, 3)) == 1.0
    assert Monitor(policy).metrics() == {"elf_fast_drift_samples": 0.0, "elf_fast_drift_alarm": 0.0}


def test_a_report_is_json(policy):
    found = filled(policy, traffic(3000, 1)).report()
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize(
    "options, message",
    [
        ({"policy": 3}, "policy: expected a Policy, got 3"),
        ({"window": 50}, "window: expected an integer .*100.* got 50"),
        ({"window": 1e3}, "window: expected an integer"),
        ({"samples_per_false_alarm": 10}, "samples_per_false_alarm: expected .* got 10"),
    ],
)
def test_wrong_settings(policy, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Monitor(**{"policy": policy, **options})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "output: expected either an ELFOutput or .* got neither"),
        ({"output": 1, "exit_index": [0]}, "output: .* got both"),
        ({"output": torch.ones(3)}, r"output: expected an ELFOutput, got .*\[3\]"),
        ({"exit_index": [0]}, "confidence: expected a tensor, an array or a list, got NoneType"),
        ({"exit_index": [0], "confidence": ["x"]}, "confidence: expected a tensor, an array"),
        ({"exit_index": [0.5], "confidence": [0.5]}, "exit_index: expected integers"),
        ({"exit_index": [True], "confidence": [0.5]}, "exit_index: expected integers"),
        ({"exit_index": [0], "confidence": [1]}, "confidence: expected floating numbers"),
        ({"exit_index": [[0]], "confidence": [0.5]}, r"exit_index: expected shape \[n\]"),
        ({"exit_index": [0, 1], "confidence": [0.5]}, "confidence: expected 2 values, .* got 1"),
        ({"exit_index": [0, 3], "confidence": [0.5, 0.5]}, r"exit_index: .* in \[0, 3\), got 3"),
        ({"exit_index": [-1], "confidence": [0.5]}, r"exit_index: .* in \[0, 3\), got -1"),
    ],
)
def test_wrong_batches_are_refused_and_not_counted(policy, arguments, message):
    monitor = Monitor(policy)
    with pytest.raises((TypeError, ValueError), match=message):
        monitor.update(**arguments)
    assert monitor.report()["seen"] == 0


def changed(state: dict, **values) -> dict:
    return {**state, **values}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: 3, r"states\[1\]: expected what Monitor.state returns, got 3"),
        (lambda s: {}, r"states\[1\]: expected what Monitor.state returns"),
        (lambda s: changed(s, policy="x"), r"states\[1\]: expected one of this policy"),
        (lambda s: changed(s, window=-5), r"states\[1\].window: expected"),
        (lambda s: changed(s, seen="x"), r"states\[1\].seen: expected"),
        (lambda s: changed(s, blocks=[[1.0]]), r"states\[1\].blocks: expected .* \[4, 4\]"),
        (lambda s: changed(s, blocks=[[["x"] * 4] * 4]), r"states\[1\]: expected what"),
        (lambda s: changed(s, blocks=[[[float("nan")] * 4] * 4]), r"states\[1\].blocks"),
        (lambda s: changed(s, blocks=s["blocks"] * 3), r"states\[1\].blocks: expected at most 10"),
    ],
)
def test_damaged_states_are_refused(policy, change, message):
    state = filled(policy, traffic(1280, 1), window=640).state()
    with pytest.raises((TypeError, ValueError), match=message):
        Monitor.merged(policy, [state, change(state)])


def test_exits_that_do_not_exist_are_counted_without_looking_at_the_device(policy):
    """As on a GPU, whose values `update` does not look at."""
    exit_index, confidence = torch.tensor([0, 7, -1, 2]), torch.tensor([0.5, 0.5, torch.nan, 0.25])
    sums = _sums(exit_index, confidence, 3)
    assert sums.tolist() == [
        [1, 0, 1, 2],
        [1, 0, 1, 1],
        [0.5, 0, 0.25, 0.5],
        [0.25, 0, 0.0625, 0.25],
    ]
    state = filled(policy, traffic(1280, 1), window=640).state()
    state["blocks"][3][0][-1] = 2.0
    with pytest.raises(ValueError, match=r"exit_index: .* in \[0, 3\), got others for 2 samples"):
        Monitor.merged(policy, [state]).report()


def test_nothing_to_merge_is_refused(policy):
    with pytest.raises(ValueError, match="states: expected at least one, got none"):
        Monitor.merged(policy, [])
