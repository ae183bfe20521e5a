"""Work of a chosen share, agreement before speed, and the command `elf-fast bench`."""

from __future__ import annotations

import argparse
import json
import math

import pytest
import torch
from torch import nn

from elf_fast import ELF, ExitHead, criteria
from elf_fast.base import ELFOutput
from elf_fast.bench import command, inference, training
from elf_fast.bench.workload import inference_work, training_work
from elf_fast.cli.main import parser
from elf_fast.timing import sample


def network(criterion="confidence", **options) -> ELF:
    torch.manual_seed(0)
    stages = [nn.Conv2d(3 if e == 0 else 8, 8, 3, padding=1) for e in range(3)]
    return ELF(stages, [ExitHead(8, 5) for _ in stages], criterion=criterion, **options)


IMAGES = torch.randn(40, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("criterion", [*criteria.TABLE])
@pytest.mark.parametrize("share, left", [(0.5, [20, 10, 10]), (0.8, [8, 6, 26]), (0.0, [40, 0, 0]),
                                         (1.0, [0, 0, 40])])  # fmt: skip
def test_the_chosen_share_goes_on(criterion, share, left):
    work = inference_work(network(criterion), IMAGES, share)
    assert work.exit_index.bincount(minlength=3).tolist() == left
    assert torch.equal(work.model(IMAGES).exit_index, work.exit_index)
    assert [len(x) for x in work.stage_inputs] == [n for n in (40, 40 - left[0], left[2]) if n]
    for drop in (True, False):
        model = network(criterion, drop_exited=drop)
        step = training_work(model, IMAGES, share)
        exits = step.model(step.images, step.target).exit_index
        assert exits.bincount(minlength=3).tolist() == left
        assert not torch.equal(model.temperatures, step.model.temperatures)  # a copy was set
        stay = left if drop else [0, 0, 0]
        sizes = [n for n in (40, 40 - stay[0], 40 - stay[0] - stay[1]) if n]
        assert [len(x) for x in step.stage_inputs] == sizes[: 1 if share == 0 else 3]


def test_candidates_do_what_they_say():
    work = inference_work(network(), IMAGES, 0.5)
    run = inference.candidates(work)
    with torch.inference_mode():
        assert torch.equal(run["elf_fast"]().prediction, run["reference"]().prediction)
        expected = IMAGES
        for stage in work.model.stages:
            expected = stage(expected)
        assert torch.equal(run["full"](), work.model.heads[-1](expected))
        seen = []
        hooks = [s.register_forward_hook(lambda m, x, y: seen.append(len(y)))
                 for s in work.model.stages]  # fmt: skip
        run["oracle"]()
        assert seen == [40, 20, 10]
    for hook in hooks:
        hook.remove()
    step = training_work(network(drop_exited=True), IMAGES, 0.5)
    run = training.candidates(step)
    for who, least in (("oracle", 6), ("full", 8), ("elf_fast", 12), ("reference", 12)):
        run[who]()
        reached = [p.grad is not None and bool(p.grad.any()) for p in step.model.parameters()]
        assert sum(reached) == least, who  # stages; the last head; all heads


def test_wrong_results_are_not_timed(monkeypatch):
    work = inference_work(network(), IMAGES, 0.5)
    right = type(work.model).forward

    def wrong(self, x, target=None):
        out = right(self, x, target)
        loss = None if out.loss is None else 1.01 * out.loss
        return out._replace(prediction=(out.prediction + 1) % 5, loss=loss)

    monkeypatch.setattr(ELF, "forward", wrong)
    with pytest.raises(RuntimeError, match="disagree on 40 of 40 samples"):
        inference.candidates(work)
    with pytest.raises(RuntimeError, match="the loss of elf_fast and of its reference differ"):
        training.candidates(training_work(network(), IMAGES, 0.5))


def output(exit_index, prediction, confidence):
    n = len(exit_index)
    return ELFOutput(
        torch.zeros(n, 2), torch.tensor(prediction), torch.tensor(confidence),
        torch.tensor(exit_index), None,
    )  # fmt: skip


def test_speed_is_refused_for_results_that_differ_but_not_for_ties():
    thresholds = torch.tensor([0.5])
    ours = output([0, 1], [0, 1], [0.5000001, 0.6])
    inference.check_agreement(ours, ours, thresholds)
    inference.check_agreement(ours, output([1, 1], [1, 1], [0.9, 0.6]), thresholds)
    with pytest.raises(RuntimeError, match="disagree on 1 of 2"):
        inference.check_agreement(ours, output([0, 1], [0, 0], [0.5, 0.6]), thresholds)
    with pytest.raises(RuntimeError, match="disagree on 1 of 2"):
        inference.check_agreement(ours, output([0, 0], [0, 1], [0.5, 0.6]), thresholds)


def test_samples_are_paired():
    calls = []
    samples = sample({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
                     seconds=0.0, burst=0.0, least=6)  # fmt: skip
    assert calls[-12:] == ["a", "b"] * 6
    samples["a"], samples["b"] = [2.0, 4.0, 6.0, 8.0], [1.0, 1.0, 2.0, 2.0]
    assert samples.ratio("a", "b").median == 3.5
    assert samples.time("a").low < samples.time("a").median < samples.time("a").high


def options(*arguments: str) -> argparse.Namespace:
    return parser().parse_args(["bench", *arguments])


def test_command(capsys):
    small = ("--model", "cifar_resnet8", "--size", "16", "--classes", "4", "--batch", "6",
             "--share", "0.5", "1", "--seconds", "0", "--training", "--device", "cpu")  # fmt: skip
    rows = command.run(options(*small, "--json"))
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(rows))
    assert [(row["mode"], row["share"]) for row in rows] == [
        ("inference", 0.5), ("training step", 0.5), ("inference", 1.0), ("training step", 1.0)
    ]  # fmt: skip
    assert all(math.isfinite(v) for row in rows for q in row["speed"].values() for v in q)
    pytest.importorskip("rich")
    rows = command.run(options(*small[:-3], "--device", "cpu", "--engine", "eager"))
    assert [row["mode"] for row in rows] == ["inference", "engine eager"] * 2
    assert set(rows[1]["microseconds"]) == {"eager", "eager, no exits"}
    said = capsys.readouterr().out
    assert "engine eager: time of eager" in " ".join(said.split())
    assert "cifar_resnet8, exits after layer1, layer2; batch 6" in said and "oracle" in said


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--batch", "0"), "--batch: expected an integer in [1, 1048576], got 0"),
        (("--share", "1.5"), "--share: expected numbers in [0, 1], got [1.5]"),
        (("--model", "resnet_18x"), "--model: expected a network"),
        (("--device", "gpu"), "device: expected cpu, cuda or another device of torch, got 'gpu'"),
        (("--model", "cifar_resnet8", "--exits", "layer7"), "layer7"),
    ],
)
def test_command_refuses(arguments, message):
    with pytest.raises(ValueError) as error:
        command.run(options(*arguments))
    assert message in str(error.value)
