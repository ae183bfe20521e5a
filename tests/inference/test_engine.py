"""An engine computes what the model computes, whatever the batch, the settings and the code."""

from __future__ import annotations

import copy
import gc
import math
import threading
import weakref

import pytest
import torch
from inference.networks import NETWORKS, C, assert_equal, deep, half_leave, maps, tokens, vectors
from torch import nn

import elf_fast
from elf_fast import inference
from elf_fast.inference import engine

SIZES = (0, 1, 2, 3, 31, 64, 150)
KINDS = [*(("eager", name) for name in NETWORKS), ("inductor", "maps"), ("inductor", "tokens")]


def switch(model: elf_fast.ELF, criterion) -> None:
    """Another criterion, with all exits off."""
    model.thresholds = elf_fast.criteria.find(model.criterion).off
    model.criterion = criterion


@pytest.fixture
def made(request, compiled):
    """(model, x, engine) of a kind; settings of the model are restored."""
    engine, name = request.param
    if engine == "inductor":
        model, x, made = compiled(name)
    else:
        model, x = NETWORKS[name]()
        made = inference.compile(model, x[:3], engine="eager", max_batch=64)
    before = model.thresholds.clone(), model.temperatures.clone(), model.criterion
    yield model, x, made
    switch(model, before[2])
    model.thresholds, model.temperatures = before[:2]


every_kind = pytest.mark.parametrize("made", KINDS, indirect=True, ids="-".join)


@every_kind
def test_batches_of_any_size(made):
    model, x, engine = made
    for n in SIZES:
        batch = torch.cat([x, x.flip(0), x * 1.5])[:n]
        assert_equal(engine(batch), model, batch)
    exits = engine(x).exit_index.bincount(minlength=len(model.stages))
    assert bool((exits > 0).all())  # the test means something at every exit


@every_kind
def test_nobody_everybody_and_one_go_on(made):
    model, x, engine = made
    confidence = torch.softmax(model.heads[0](model.stages[0](x)) / model.temperatures[0], 1).amax(
        1
    )
    second = confidence.detach().sort().values[1].item()
    for first in (0.0, math.inf, second - 1e-3):
        model.thresholds[0] = first  # in place
        assert_equal(engine(x), model, x)
    model.thresholds = math.inf  # another tensor
    assert engine(x).exit_index.eq(len(model.stages) - 1).all()
    assert_equal(engine(x), model, x)


@every_kind
def test_settings_change_between_calls(made):
    model, x, engine = made
    for criterion in ("margin", "entropy", lambda z: z.amax(1) - z.mean(1), "confidence"):
        switch(model, criterion)
        model.thresholds = 0.6
        assert_equal(engine(x), model, x)
    model.thresholds = torch.linspace(0.2, 0.6, C).expand(len(model.stages) - 1, C)
    assert_equal(engine(x), model, x)
    model.temperatures = 0.1
    assert_equal(engine(x), model, x)


@every_kind
def test_nan_rows_go_on_to_the_end(made):
    model, x, engine = made
    x = x.clone()
    x[::5, 0] = math.nan
    out = engine(x)
    assert out.exit_index[::5].eq(len(model.stages) - 1).all()
    assert_equal(out, model, x)


@every_kind
def test_memory_formats_and_the_callers_batch(made):
    model, x, engine = made
    before = x.clone()
    with torch.inference_mode():
        inside = engine(x)
    assert_equal(inside, model, x)
    if x.dim() == 4:
        assert_equal(engine(x.to(memory_format=torch.channels_last)), model, x)
    wide = torch.stack([x, x], dim=-1)[..., 0]  # gaps between elements
    assert_equal(engine(wide), model, x)
    assert_equal(engine(x[:1].expand_as(x)), model, x[:1].expand_as(x))
    assert torch.equal(x, before)


@every_kind
def test_results_belong_to_the_caller(made):
    """A later call leaves them as they are, and a user may write into them."""
    model, x, engine = made
    first = engine(x)
    kept = [t.clone() for t in first[:4]]
    engine(x.flip(0))
    assert all(map(torch.equal, first[:4], kept))
    first.logits.add_(1.0)
    assert not first.logits.is_inference() and not first.logits.requires_grad


@every_kind
def test_threads_at_once(made):
    model, x, engine = made
    batches = [torch.cat([x, x])[i : i + 7 * (i + 1)] for i in range(6)]
    found: list = [[] for _ in batches]

    def run(i: int) -> None:
        for _ in range(5):
            found[i].append(engine(batches[i]))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outs, batch in zip(found, batches, strict=True):
        assert len(outs) == 5
        for out in outs:
            assert_equal(out, model, batch)


def test_exits_where_nobody_leaves_between_others():
    """Results of samples that leave later still find their places."""
    model, x = deep(6)
    engine = inference.compile(model, x, engine="eager")
    before = model.thresholds.clone()
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        off = torch.rand(5, generator=generator) < 0.5
        model.thresholds.copy_(before.masked_fill(off, math.inf))
        assert_equal(engine(x), model, x)


def test_threads_see_new_settings_at_once():
    model, x = deep(3)
    engine = inference.compile(model, x, engine="eager")
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            engine(x[:2])

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for i in range(300):
            model.thresholds = (0.0, math.inf)[i % 2]
            assert engine(x[:2]).exit_index.eq(2 * (i % 2)).all()
    finally:
        stop.set()
        for thread in threads:
            thread.join()


class NeedsEvaluation(nn.Module):
    """Makes in `train()` what it reads in evaluation, as networks with caches do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(8) * 2)
        self.cached = None

    def train(self, mode: bool = True):
        self.cached = None if mode else self.weight.detach() * 3
        return super().train(mode)

    def forward(self, x):
        return x @ (self.weight if self.training else self.cached)


def test_models_in_training_mode_are_compiled_for_evaluation():
    model, x = deep(2)
    model.stages[1] = NeedsEvaluation()
    model, _ = half_leave(model, x)
    engine = inference.compile(model.train(), x, engine="eager")
    assert_equal(engine(x), model.eval(), x)


def test_autocast_and_modes_around_a_call_have_no_effect():
    model, x = maps()
    with torch.autocast("cpu", torch.bfloat16):
        engine = inference.compile(model, x[:3], engine="eager")
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        out = engine(x)
        stage = engine.run_stage(0, engine.stage_input(0, 4).copy_(x[:4]))
    assert stage.features.dtype == torch.float32
    assert_equal(out, model.eval(), x)


def test_dtypes():
    for dtype in (torch.float64, torch.bfloat16):
        model, x = vectors()
        model, x = model.to(dtype), x.to(dtype)
        out = inference.compile(model, x[:3], engine="eager")(x)
        with torch.no_grad():
            expected = model(x)
        assert torch.equal(out.logits, expected.logits)
        assert torch.equal(out.exit_index, expected.exit_index)
        assert out.confidence.dtype == torch.float32


def test_heads_of_different_dtypes():
    class Wide(nn.Module):
        def forward(self, x):
            return x.double()

    model, x = vectors()
    model.heads[-1] = Wide()
    assert_equal(inference.compile(model, x[:3], engine="eager")(x), model, x)


CHANGES = {
    "an optimiser": lambda model: torch.optim.SGD(model.parameters(), 1.0).step(),
    "load_state_dict": lambda model: model.load_state_dict(model.state_dict()),
    "assign": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
    "double": lambda model: model.double(),
    "a statistic": lambda model: model.stages[1][0].norm.running_mean.add_(1.0),
    "a head": lambda model: setattr(model.heads, "0", elf_fast.ExitHead(8, C)),
    "a layer": lambda model: setattr(model.heads[1], "classifier", nn.Linear(8, C)),
    "a parameter": lambda model: setattr(
        model.heads[1].classifier, "bias", nn.Parameter(torch.zeros(C))
    ),
    "the last bias": lambda model: model.heads[-1].classifier.bias.detach().add_(1.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_raise(change):
    model, x = maps()
    engine = inference.compile(model, x[:3], engine="eager")
    engine(x)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    CHANGES[change](model)
    with pytest.raises(RuntimeError, match="engine: expected the weights that the model had"):
        for _ in range(inference.frozen.GROUPS):
            engine(x)
    with pytest.raises(RuntimeError, match="compile it again"):
        engine(x)


def test_thresholds_of_a_loaded_state_are_no_change_of_weights():
    model, x = maps()
    engine = inference.compile(model, x[:3], engine="eager")
    model.thresholds.fill_(0.9)
    for _ in range(inference.frozen.GROUPS):
        engine(x)


@pytest.mark.parametrize(
    "x, error, message",
    [
        ([1.0], TypeError, "x: expected a tensor, got [1.0] (list)"),
        (torch.zeros(2, 4, 1), ValueError, "x: expected a float32 tensor of shape [N, 4]"),
        (torch.zeros(2, 5), ValueError, "got a float32 tensor of shape [2, 5]"),
        (torch.zeros(4), ValueError, "got a float32 tensor of shape [4]"),
        (torch.zeros(2, 4).double(), ValueError, "got a float64 tensor of shape [2, 4]"),
        (torch.zeros(2, 4, device="meta"), ValueError, "x: expected device cpu"),
    ],
)
def test_a_wrong_batch_is_refused(x, error, message):
    model, example = vectors()
    engine = inference.compile(model, example, engine="eager")
    with pytest.raises(error) as caught:
        engine(x)
    assert message in str(caught.value)


def test_run_stage_gives_what_the_whole_gives():
    model, x = maps()
    engine = inference.compile(model, x[:3], engine="eager")
    whole = engine(x)
    rows = torch.arange(len(x))
    held = engine.stage_input(0, len(x)).copy_(x)
    for e in range(engine.stages):
        result = engine.run_stage(e, held)
        leaves = torch.ones(len(rows), dtype=torch.bool)
        leaves[result.survivors] = False
        assert whole.exit_index[rows[leaves]].eq(e).all()
        torch.testing.assert_close(result.logits[leaves], whole.logits[rows[leaves]])
        assert torch.equal(result.prediction[leaves], whole.prediction[rows[leaves]])
        torch.testing.assert_close(result.confidence[leaves], whole.confidence[rows[leaves]])
        rows = rows[result.survivors]
        if e == engine.stages - 1:
            assert result.features is None and not len(rows)
            break
        held = engine.stage_input(e + 1, len(rows)).copy_(result.features[result.survivors])
    held = engine.stage_input(1, 4).zero_()
    for wrong in (held[:0], held.double(), held.contiguous(), held[:, :4]):
        with pytest.raises(ValueError, match=r"x: expected \[1 to 256, 8, 12, 12\] as stage_input"):
            engine.run_stage(1, wrong)


def test_close_and_collection_free_the_weights():
    model, x = tokens()
    engine = inference.compile(model, x[:3], engine="eager")
    copies = weakref.ref(engine.stage_code(0, 1))
    engine(x)
    engine.close()
    gc.collect()
    assert copies() is None
    with pytest.raises(RuntimeError, match="engine: expected an open engine, got a closed one"):
        engine(x)
    with pytest.raises(RuntimeError, match="engine: expected an open engine, got a closed one"):
        engine.stage_code(0, 1)
    engine = inference.compile(model, x[:3], engine="eager")
    copies = weakref.ref(engine.stage_code(0, 1))
    del engine
    gc.collect()
    assert copies() is None


def test_calls_of_changing_size_do_not_grow_the_process(compiled):
    model, x, engine = compiled("maps")

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    sizes = torch.randint(1, 65, (1500,), generator=torch.Generator().manual_seed(0)).tolist()
    for n in sizes[:100]:
        engine(x[:n])
    before = resident()
    for n in sizes:
        engine(x[:n])
    assert resident() - before < 10e6


def test_code_that_writes_is_recognised_on_any_example():
    """Values that an operation leaves as they are do not hide it."""
    for x in (torch.rand(2, 4), torch.zeros(2, 4)):
        assert not engine.keeps_input(lambda x: [x.relu_() + 1], x)
        assert not engine.keeps_input(lambda x: [x[:1]], x)
        assert engine.keeps_input(lambda x: [x.relu()], x)


def test_a_stage_that_writes_into_its_input_or_returns_it():
    class InPlace(nn.Module):
        def forward(self, x):
            return x.relu_()

    torch.manual_seed(0)
    for first in (InPlace(), nn.Identity()):
        stages = [first, nn.Sequential(InPlace(), nn.Linear(4, 4))]
        model = elf_fast.ELF(
            stages, [elf_fast.ExitHead(4, 3), elf_fast.ExitHead(4, 3)], thresholds=0.4
        ).eval()
        x = torch.randn(20, 4)
        before = x.clone()
        out = inference.compile(model, x.abs(), engine="eager")(x)
        assert torch.equal(x, before)
        assert_equal(out, model, x.clone())
        assert len(out.exit_index.unique()) == 2
