"""ELF under DistributedDataParallel, against one process that has the whole batch.

Ranks are processes in a gloo group. They make networks and data from seeds, take their rows
of the data and return arrays, in float64 unless a test says otherwise.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import sync_batch_norm
import torch
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from elf_fast import ELF, ExitHead, losses, reference

CLASSES, CHANNELS, SAMPLES = 4, 4, 48
COLLECTIVE = timedelta(seconds=45)  # a rank that waits longer fails
TASK = 120.0  # seconds for a task, in case it hangs outside of a collective


class Ranks:
    """Processes in one gloo group. The first R run a task together, in a subgroup of R."""

    MOST = 3

    def __init__(self, store: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.ranks = [
            concurrent.futures.ProcessPoolExecutor(
                1, mp_context=context, initializer=_join, initargs=(rank, self.MOST, store)
            )
            for rank in range(self.MOST)
        ]
        for executor in self.ranks:  # its first task starts a process, and every process must join
            executor.submit(int)

    def run(self, task: Callable, *arguments: tuple) -> list:
        """task(group, *arguments[rank]) on as many ranks as there are arguments."""
        R = len(arguments)
        futures = [
            rank.submit(_in_group, R, task, args)
            for rank, args in zip(self.ranks, arguments, strict=False)
        ]
        return [future.result(TASK) for future in futures]

    def close(self) -> None:
        for rank in self.ranks:
            for process in rank._processes.values():
                process.kill()
            rank.shutdown()


_groups: dict[int, Any] = {}  # in a rank: each group by its size; None: the default group
_kernels = None


def _join(rank: int, R: int, store: str) -> None:
    global _kernels
    torch.set_num_threads(1)
    _kernels = sync_batch_norm.serve_on_cpu()
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=R, timeout=COLLECTIVE
    )
    _groups[R] = None
    if R > 2:
        _groups[2] = distributed.new_group([0, 1], timeout=COLLECTIVE)


def _in_group(R: int, task: Callable, args: tuple) -> Any:
    return task(_groups[R], *args)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """One CPU thread, as the ranks have: a second one would only wait for a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ranks() -> Iterator[list[Ranks]]:
    started: list[Ranks] = []
    yield started
    for ranks in started:
        ranks.close()


@pytest.fixture
def together(ranks, tmp_path) -> Callable:
    """`Ranks.run`. Ranks that failed are not used again: they may still wait in a collective."""

    def run(task: Callable, *arguments: tuple) -> list:
        if not ranks:
            ranks.append(Ranks(f"{tmp_path}/store"))
        try:
            return ranks[0].run(task, *arguments)
        except BaseException:
            ranks.pop().close()
            raise

    return run


# What the ranks and the single process have in common


class Scaled(nn.Module):
    """A user's exit loss that has a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.scale * logits, target, reduction="none")


LOSSES = {
    "cross-entropy": lambda: None,
    "LDAM": lambda: losses.LDAMLoss([40, 20, 10, 5], scale=4.0),
    "callable": Scaled,
}


@dataclasses.dataclass(frozen=True)
class Case:
    cls: type[reference.ELF] = ELF
    drop_exited: bool | None = True
    loss: str = "cross-entropy"
    norm: str = ""  # "batch", or "sync" where there are ranks
    dtype: torch.dtype = torch.float64

    def model(self) -> reference.ELF:
        torch.manual_seed(11)
        stages, heads = [], []
        for e in range(3):
            layers: list[nn.Module] = [nn.Conv2d(CHANNELS if e else 3, CHANNELS, 3, padding=1)]
            layers += [nn.BatchNorm2d(CHANNELS)] if self.norm else []
            stages.append(nn.Sequential(*layers, nn.ReLU()))
            heads.append(ExitHead(CHANNELS, CLASSES, conv=self.norm != "" and e == 1))
            nn.init.normal_(heads[-1].classifier.weight, std=4.0)
        model = self.cls(
            stages, heads, thresholds=0.5, drop_exited=self.drop_exited,
            exit_loss=LOSSES[self.loss](), exit_weights=[1.0, 0.5, 2.0],
        ).to(self.dtype)  # fmt: skip
        return model.train()

    def shared(self, group: Any, **options: Any) -> DistributedDataParallel:
        model: nn.Module = self.model()
        if self.norm == "sync":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model, group)
        return DistributedDataParallel(model, process_group=group, **options)


def samples(rows: list[int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(SAMPLES, 3, 5, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    return x[rows], y[rows]


def outcome(model: nn.Module, **also: Any) -> dict[str, Any]:
    """Gradients (0 where there is none) and buffers, as arrays."""
    gradients = {
        name: (torch.zeros_like(p) if p.grad is None else p.grad).detach().numpy().copy()
        for name, p in model.named_parameters()
    }
    buffers = {name: b.numpy().copy() for name, b in model.named_buffers()}
    return {"gradients": gradients, "buffers": buffers, **also}


def step(group: Any, case: Case, rows: list[int]) -> dict[str, Any]:
    """One forward and backward pass on a rank."""
    parallel = case.shared(group)
    out = parallel(*samples(rows))
    out.loss.backward()
    return outcome(parallel.module, loss=out.loss.item(), exits=out.exit_index.tolist())


def alone(case: Case, rows: list[int]) -> dict[str, Any]:
    """The same in a single process."""
    model = case.model()
    out = model(*samples(rows))
    out.loss.backward()
    return outcome(model, loss=out.loss.item(), exits=out.exit_index.tolist())


def shares(case: Case, R: int) -> list[list[int]]:
    """Rows for R ranks, in uneven shares. Only on rank 1 do all samples leave at exit 0."""
    rows = list(range(SAMPLES))
    exits = alone(case, rows)["exits"]
    assert {0, 1, 2} == set(exits)
    first = [row for row in rows if exits[row] == 0]
    assert len(first) >= 6
    rest = [row for row in rows if row not in first[:5]]
    return [rest, first[:5]] if R == 2 else [rest[:30], first[:5], rest[30:]]


def joined(rows: list[list[int]]) -> list[int]:
    return list(itertools.chain(*rows))


def assert_equal(results: list[dict], expected: dict) -> None:
    """Every rank has the gradients and buffers of the single process, whose loss is their mean."""
    assert sum(r["loss"] for r in results) / len(results) == pytest.approx(expected["loss"])
    for result in results:
        for part in ("gradients", "buffers"):
            assert result[part].keys() == expected[part].keys()
            for name, value in expected[part].items():
                torch.testing.assert_close(
                    torch.tensor(result[part][name]), torch.tensor(value),
                    rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}",
                )  # fmt: skip


BOTH = pytest.mark.parametrize("cls", [reference.ELF, ELF], ids=["reference", "elf_fast"])
DROP = pytest.mark.parametrize("drop_exited", [True, False, None], ids=["drop", "keep", "auto"])
NORM = pytest.mark.parametrize("norm", ["", "sync"], ids=["no norm", "SyncBatchNorm"])


@BOTH
@DROP
@NORM
@pytest.mark.parametrize("R, loss", [(2, "cross-entropy"), (2, "LDAM"), (3, "callable")])
def test_gradients_are_those_of_one_process(together, R, loss, norm, drop_exited, cls):
    case = Case(cls, drop_exited, loss, norm)
    rows = shares(case, R)
    results = together(step, *((case, share) for share in rows))
    assert set(results[1]["exits"]) == {0} and max(results[0]["exits"]) == 2
    assert_equal(results, alone(case, joined(rows)))


@NORM
@DROP
def test_a_rank_without_samples_takes_part(together, drop_exited, norm):
    case = Case(drop_exited=drop_exited, loss="callable", norm=norm)
    rows = list(range(SAMPLES))
    results = together(step, (case, []), (case, rows))
    assert results[0]["exits"] == [] and results[0]["loss"] == 0
    assert_equal(results, alone(case, rows))


@functools.lru_cache
def rows_of_which_go_on(norm: str, survivors: int) -> list[int]:
    """Rows of one batch of which `survivors` do not leave at exit 0. The first row leaves."""
    rows = list(range(SAMPLES))
    while True:
        exits = alone(Case(norm=norm), rows)["exits"]
        on = [row for row, e in zip(rows, exits, strict=True) if e > 0]
        if len(on) == survivors:
            assert exits[0] == 0 and len(rows) > 8
            return rows
        rows.remove(on[-1])


@BOTH
@NORM
@DROP
def test_without_survivors_running_statistics_do_not_change(together, drop_exited, norm, cls):
    case = Case(cls, drop_exited, norm=norm)
    rows = rows_of_which_go_on(case.norm, 0)
    assert_equal(together(step, (case, rows[:3]), (case, rows[3:])), alone(case, rows))


@BOTH
def test_a_lone_survivor_of_all_ranks_gets_one_exited_sample(together, cls):
    case = Case(cls, norm="sync")
    rows = rows_of_which_go_on(case.norm, 1)
    assert_equal(together(step, (case, rows[:8]), (case, rows[8:])), alone(case, rows))


@BOTH
def test_lone_survivors_of_several_ranks_get_no_exited_sample(together, cls):
    case = Case(cls, norm="sync")
    rows = rows_of_which_go_on(case.norm, 2)
    exits = alone(case, rows)["exits"]
    cut = max(i for i, e in enumerate(exits) if e > 0)
    results = together(step, (case, rows[:cut]), (case, rows[cut:]))
    assert [sum(e > 0 for e in r["exits"]) for r in results] == [1, 1]
    assert_equal(results, alone(case, rows))


@DROP
def test_batch_norm_of_a_rank_counts_the_batches_it_has_seen(together, drop_exited):
    case = Case(drop_exited=drop_exited, norm="batch")
    leaving = rows_of_which_go_on(case.norm, 0)
    results = together(step, (case, list(range(SAMPLES))), (case, leaving))
    assert set(results[1]["exits"]) == {0}
    for result, passes in zip(results, (1, 0), strict=True):
        for e, seen in ((0, 1), (1, passes), (2, passes)):
            assert result["buffers"][f"stages.{e}.1.num_batches_tracked"] == seen
            assert bool(result["buffers"][f"stages.{e}.1.running_mean"].any()) == bool(seen)
    for name, gradient in results[0]["gradients"].items():
        assert (gradient == results[1]["gradients"][name]).all() and gradient.any()


def part_of_loss(group: Any, case: Case, rows: list[int]) -> float:
    return step(group, case, rows)["loss"]


def test_a_rank_reports_its_part_of_the_loss_times_the_ranks(together):
    case = Case()
    rows = shares(case, 3)
    for share, reported in zip(
        rows, together(part_of_loss, *((case, share) for share in rows)), strict=True
    ):
        own = alone(case, share)["loss"]
        assert reported == pytest.approx(own * len(share) * 3 / SAMPLES)
    equal = [list(range(r, SAMPLES, 2)) for r in range(2)]
    assert together(part_of_loss, *((case, share) for share in equal)) == pytest.approx(
        [alone(case, share)["loss"] for share in equal]
    )


def train(model: nn.Module, sync: Callable[[], Any], batches: list[list[int]]) -> None:
    """SGD over the batches, two to a step; the first of two runs inside `sync()`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        with sync():
            model(*samples(first)).loss.backward()
        model(*samples(second)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, Any]:
    return {name: v.numpy().copy() for name, v in model.state_dict().items()}


def train_shared(group: Any, case: Case, batches: list[list[int]], options: dict) -> dict[str, Any]:
    parallel = case.shared(group, **options)
    train(parallel, parallel.no_sync, batches)
    return weights(parallel.module)


@DROP
@NORM
def test_training_with_accumulated_gradients_ends_with_the_same_weights(
    together, norm, drop_exited
):
    case = Case(drop_exited=drop_exited, norm=norm)
    generator = torch.Generator().manual_seed(1)
    whole = [torch.randperm(SAMPLES, generator=generator)[:24].tolist() for _ in range(8)]
    cuts = [12, 0, 23, 5, 24, 1, 12, 17]
    parts = (
        [batch[:cut] for batch, cut in zip(whole, cuts, strict=True)],
        [batch[cut:] for batch, cut in zip(whole, cuts, strict=True)],
    )
    model = case.model()
    train(model, contextlib.nullcontext, whole)
    for options in ({}, {"gradient_as_bucket_view": True, "bucket_cap_mb": 1e-3}):
        for result in together(train_shared, *((case, part, options) for part in parts)):
            for name, value in weights(model).items():
                torch.testing.assert_close(
                    torch.tensor(result[name]), torch.tensor(value), rtol=1e-7, atol=1e-9
                )


def step_by_logits(group: Any, case: Case, rows: list[int]) -> dict[str, Any]:
    """Backpropagates a user's loss of the logits, in passes with and without a target."""
    parallel = case.shared(group)
    x, y = samples(rows)
    for target in (y, None):
        parallel(x, target).logits.square().sum().backward()
    return outcome(parallel.module, loss=0.0)


def test_every_parameter_takes_part_whatever_is_backpropagated(together):
    case = Case()
    leaving = rows_of_which_go_on(case.norm, 0)
    ranks = together(step_by_logits, (case, leaving), (case, leaving[:5]))
    for name, gradient in ranks[0]["gradients"].items():
        assert (gradient == ranks[1]["gradients"][name]).all()
        assert gradient.any() == name.startswith(("stages.0", "heads.0"))


# What runs no collective


def uneven(group: Any, extra: int, case: Case, rows: list[int]) -> dict[str, Any]:
    """A step, after `extra` rounds of work that other ranks do not do."""
    parallel = case.shared(group, broadcast_buffers=False)
    x, y = samples(rows)
    own = dataclasses.replace(case, norm="").model()
    for _ in range(extra):
        own(x, y).loss.backward()  # a network of its own, in training
        with torch.no_grad():
            parallel.eval()(x, y)
            parallel.module(x)
    out = parallel.train()(x, y)
    out.loss.backward()
    return outcome(parallel.module, loss=out.loss.item())


@NORM
def test_evaluation_and_training_outside_of_ddp_run_no_collective(together, norm):
    case = Case(norm=norm)
    rows = shares(case, 2)
    results = together(uneven, (3, case, rows[0]), (0, case, rows[1]))
    assert_equal(results, alone(case, joined(rows)))


# With other versions and features of torch


def passes_without_the_name(group: Any) -> list[str]:
    """Error messages, or "", of training inside of DDP, training outside of it, and evaluation."""
    parallel, said = Case().shared(group), []
    with mock.patch("elf_fast.ranks._running_ddp", None):
        for model, training in ((parallel, True), (Case().model(), True), (parallel.module, False)):
            try:
                model.train(training)(*samples(list(range(8))))
                said.append("")
            except RuntimeError as error:
                said.append(str(error))
    return said


def test_where_torch_lacks_the_name_ranks_refuse_to_train(together, monkeypatch):
    for inside, alone, evaluation in together(passes_without_the_name, (), ()):
        assert inside == alone and not evaluation
        assert "expected DistributedDataParallel._get_active_ddp_module" in inside
        assert f"got torch {torch.__version__} without it" in inside
    monkeypatch.setattr("elf_fast.ranks._running_ddp", None)
    assert Case().model()(*samples(list(range(8)))).loss.isfinite()


def compiled_step(group: Any, case: Case, rows: list[int]) -> dict[str, Any]:
    parallel = case.shared(group)
    for stage in parallel.module.stages:
        stage.compile(backend="aot_eager")
    out = parallel(*samples(rows))
    out.loss.backward()
    return outcome(parallel.module, loss=out.loss.item())


def test_compiled_stages(together):
    case = Case()
    rows = shares(case, 2)
    results = together(compiled_step, *((case, share) for share in rows))
    assert_equal(results, alone(case, joined(rows)))


def autocast_step(group: Any, case: Case, rows: list[int]) -> dict[str, Any]:
    parallel = case.shared(group)
    x, y = samples(rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = parallel(x.to(case.dtype), y)
    out.loss.backward()
    return outcome(parallel.module, loss=out.loss.item(), exits=out.exit_index.tolist())


def test_synchronised_norms_under_autocast(together):
    """Ranks with and without survivors send values of the same dtype."""
    case = Case(norm="sync")
    rows = shares(case, 2)
    single = dataclasses.replace(case, dtype=torch.float32)
    results = together(autocast_step, *((single, share) for share in rows))
    assert set(results[1]["exits"]) == {0}
    expected = alone(case, joined(rows))
    assert list(itertools.chain(*(r["exits"] for r in results))) == expected["exits"]
    # The gradient of a convolution before a norm is a small difference of bfloat16 numbers.
    for part, relative, absolute in (("gradients", 0.25, 5e-3), ("buffers", 0.01, 1e-4)):
        for result, (name, value) in itertools.product(results, expected[part].items()):
            value = torch.tensor(value).float()
            error = (torch.tensor(result[part][name]).float() - value).norm()
            assert error <= relative * value.norm() + absolute, name


def fail_on_rank_1(rank: int, store: str) -> None:
    _join(rank, 2, store)
    parallel = Case().shared(None)
    x, y = samples(list(range(8)))
    parallel(x, y).loss.backward()
    parallel(x, y + (CLASSES if rank else 0)).loss.backward()


def test_an_error_on_one_rank_ends_the_run_and_is_shown(tmp_path):
    started = time.monotonic()
    with pytest.raises(torch.multiprocessing.ProcessRaisedException) as error:
        torch.multiprocessing.spawn(fail_on_rank_1, args=(f"{tmp_path}/store",), nprocs=2)
    assert "target: expected 0 <= target < 4" in str(error.value)
    assert time.monotonic() - started < COLLECTIVE.total_seconds()
