"""`compile`: what it refuses, what it keeps, what it says."""

from __future__ import annotations

import gc
import os
import shutil

import pytest
import torch
from inference.networks import assert_equal, maps, vectors
from torch import nn

import elf_fast
from elf_fast import inference
from elf_fast.inference import cache as caches
from elf_fast.inference import code, compiling, packing, parts


def compile_maps(cache, engine="auto"):
    model, x = maps()
    options = dict(max_batch=64, buckets=(1,), cache_dir=cache)
    return model, x, inference.compile(model, x[:3], engine=engine, **options)


@pytest.fixture(scope="module")
def filled(compiled, cache):
    """The cache, after the code of `maps` is in it."""
    compiled("maps")
    return cache


@pytest.fixture
def no_compiler(monkeypatch):
    """Fails if something is compiled."""

    def refuse(*args):
        raise AssertionError("compiled again")

    monkeypatch.setattr(compiling, "build_package", refuse)


def test_a_second_call_and_other_engines_compile_nothing(filled, no_compiler):
    for engine in ("auto", "inductor"):
        model, x, made = compile_maps(filled, engine)
        assert made.report().from_cache and not made.report().unavailable
        assert_equal(made(x), model, x)
    assert not list(filled.glob(".new-*"))  # nothing unfinished


def test_the_report_names_code_times_and_reasons(filled, no_compiler):
    _, _, made = compile_maps(filled)
    report = made.report()
    for e in range(made.stages):
        rows = [row for row in report.stages if row.stage == e]
        assert [row.first for row in rows] == [1, *(row.last + 1 for row in rows[:-1])]
        assert rows[-1].last == 64
        for row in rows:
            names = {"eager", "inductor"} | ({"inductor for 1"} if row.timed_at == 1 else set())
            assert set(row.milliseconds) == names
            usable = {n: ms for n, ms in row.milliseconds.items() if "for" not in n or row.last < 2}
            assert row.code == min(usable, key=usable.get) and row.why == "the fastest"
    text = str(report)
    assert text.startswith(f"engine auto, from {filled}")
    assert "stage 0, batches of 1" in text and " ms for 64)" in text


def test_damaged_files_and_times_are_made_again(filled, tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(compiling, "build_package", lambda *args: _unavailable(built))
    for damage in ("package", "json", "key"):
        folder = tmp_path / damage
        shutil.copytree(filled, folder)
        for entry in folder.iterdir():
            if damage == "package":
                for file in entry.glob("*.pt2"):
                    file.write_bytes(file.read_bytes()[:1000])
            else:
                text = "{" if damage == "json" else '{"batches": 1}'
                (entry / "engine.json").write_text(text)
        built.clear()
        model, x, made = compile_maps(folder)
        assert len(built) == 4 and not made.report().from_cache
        assert_equal(made(x), model, x)


def _unavailable(built: list) -> None:
    built.append(1)
    raise code.Unavailable("no compiler here")


def test_code_of_other_weights_is_not_used(filled, monkeypatch):
    """Even if both models have one key in the cache: results are compared."""
    model, x = maps()
    with torch.no_grad():
        model.stages[0][0].weight.mul_(1.1)
    right = caches.key_of
    other = parts.parts_of(maps()[0])
    monkeypatch.setattr(compiling, "key_of", lambda p, found, s: right(other, found, s))
    built: list = []
    monkeypatch.setattr(compiling, "build_package", lambda *args: _unavailable(built))
    folder = filled.parent / "collision"
    shutil.copytree(filled, folder)
    made = inference.compile(model, x[:3], max_batch=64, buckets=(1,), cache_dir=folder)
    assert built and not made.report().from_cache
    assert_equal(made(x), model, x)


def test_the_key_depends_on_weights_settings_and_shapes():
    model, x = vectors()
    made = parts.parts_of(model)
    found = parts.examples(made, x[:3])
    key = caches.key_of(made, found, [64])
    assert key == caches.key_of(parts.parts_of(model), found, [64])
    assert key != caches.key_of(made, found, [65])
    for change in (lambda m: setattr(m, "limit", 3.0), lambda m: setattr(m, "t", torch.ones(1))):
        changed = parts.parts_of(model)
        change(changed[0].stage)
        assert key != caches.key_of(changed, found, [64])
    with torch.no_grad():
        model.heads[2].register_buffer("more", torch.zeros(1))
    assert key != caches.key_of(parts.parts_of(model), found, [64])


def test_without_a_compiler_auto_runs_eagerly_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", _no_compiler)
    model, x = vectors()
    made = inference.compile(model, x[:3], cache_dir=tmp_path)
    assert {row.code for row in made.report().stages} == {"eager"}
    assert "stage 0, inductor for batches of 1: RuntimeError: no g++" in str(made.report())
    assert made.report().cache is None and not os.listdir(tmp_path)  # the next call tries again
    assert_equal(made(x), model, x)
    with pytest.raises(RuntimeError, match="engine: inductor cannot serve every stage: stage 0"):
        inference.compile(model, x[:3], engine="inductor", cache_dir=tmp_path)


def _no_compiler(*args, **kwargs):
    raise RuntimeError("no g++\nand more")


def test_code_with_wrong_results_is_not_used(tmp_path, monkeypatch):
    def fake(part, example, path, batch):
        path.write_bytes(b"")

    def wrong(path, name, batch):
        return code.Code(name, lambda x: [torch.zeros(len(x), 8)] * 2, batch)

    monkeypatch.setattr(compiling, "build_package", fake)
    monkeypatch.setattr(compiling, "load_package", wrong)
    model, x = vectors()
    made = inference.compile(model, x[:3], cache_dir=tmp_path)
    assert {row.code for row in made.report().stages} == {"eager"}
    assert "gives other results than the model for 1 samples" in str(made.report())


class BySize(nn.Module):
    """Decides on the size of the batch."""

    def forward(self, x):
        return x * 2 if len(x) < 10 else x


def test_code_is_compared_at_more_than_one_size():
    part = parts.Part(BySize(), nn.Identity(), is_last=True)
    x = torch.randn(3, 4)
    wrong = code.Code("inductor", lambda x: (x * 2,))
    with pytest.raises(code.Unavailable, match="for 33 samples"):
        code.check(wrong, part, parts.Example(x, part(x)))


def test_close_unmaps_compiled_code(filled, no_compiler):
    def mapped() -> set[str]:
        with open("/proc/self/maps") as file:
            return {line.split()[-1] for line in file if ".so" in line}

    before = mapped()
    _, x, made = compile_maps(filled, "inductor")
    made(x)
    assert mapped() - before
    made.close()
    gc.collect()
    assert mapped() <= before


def test_packing_replaces_functions_of_inductor_and_restores_them(monkeypatch):
    """The torch that runs here has them."""
    from torch._inductor.fx_passes import mkldnn_fusion

    device_op = type(mkldnn_fusion._get_mkldnn_device_op("cpu"))
    before = mkldnn_fusion.has_free_symbols, device_op.pack_conv_weight
    with packing.packed_convolutions():
        assert not mkldnn_fusion.has_free_symbols(torch.Size([2, 3, 4, 4]))
        assert device_op.pack_conv_weight is not before[1]
    assert (mkldnn_fusion.has_free_symbols, device_op.pack_conv_weight) == before
    monkeypatch.delattr(mkldnn_fusion, "has_free_symbols")
    with packing.packed_convolutions():  # a torch without the function
        assert device_op.pack_conv_weight is before[1]


class Centred(nn.Module):
    """Mixes samples in evaluation."""

    def forward(self, x):
        return x - x.mean(0)


MODEL, X = vectors()
BATCH_NORM = elf_fast.ELF(
    [nn.Linear(4, 8), nn.BatchNorm1d(8, track_running_stats=False)], [nn.Linear(8, 3)] * 2
)
MIXES = elf_fast.ELF([nn.Linear(4, 8), Centred()], [nn.Linear(8, 3)] * 2)
REFUSED = {
    "a network": ((nn.Linear(4, 3), X), {}, TypeError, "model: expected an elf_fast.ELF, got Lin"),
    "a reference": ((elf_fast.unfuse(MODEL), X), {}, TypeError, "elf_fast.fuse makes one"),
    "a list": ((MODEL, [1]), {}, TypeError, "example_input: expected a tensor"),
    "no sample": ((MODEL, X[:0]), {}, ValueError, "example_input: expected a batch [N, ...]"),
    "engine": ((MODEL, X), {"engine": "onnx"}, ValueError, "engine: expected one of auto, eager"),
    "max_batch": ((MODEL, X), {"max_batch": 0}, ValueError, "max_batch: expected"),
    "buckets": ((MODEL, X), {"buckets": [0]}, ValueError, "buckets: expected"),
    "large bucket": ((MODEL, X), {"buckets": [300]}, ValueError, "buckets: expected"),
    "a string": ((MODEL, X), {"buckets": "16"}, TypeError, "buckets: expected batch sizes"),
    "BatchNorm": ((BATCH_NORM, X), {}, ValueError, "BatchNorm without running statistics"),
    "mixing, one sample": ((MIXES, X[:1]), {}, ValueError, "stages[1] or heads[1] gives other"),
    "mixing, zeros": ((MIXES, X * 0), {}, ValueError, "stages[1] or heads[1] gives other"),
    "another shape": ((MODEL, X[:, :2]), {}, ValueError, "example_input: expected a batch that"),
    "mixing": ((MIXES, X), {}, ValueError, "stages[1] or heads[1] gives other results for 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    args, options, error, message = REFUSED[case]
    with pytest.raises(error) as caught:
        inference.compile(*args, **{"cache_dir": tmp_path} | options)
    assert message in str(caught.value)
    assert not os.listdir(tmp_path)


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cache_dir: cannot write to"):
        inference.compile(MODEL, X, cache_dir=tmp_path / "file")


def test_without_a_writable_cache_of_the_user_nothing_is_kept(filled, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (entry,) = [e for e in filled.iterdir() if len(list(e.glob("*.pt2"))) == 4]
    seen = []

    def copied(part, example, path, batch):
        seen.append(path.parent)
        shutil.copy(entry / path.name, path)

    monkeypatch.setattr(compiling, "build_package", copied)
    model, x = maps()
    made = inference.compile(model, x[:3], engine="inductor", max_batch=64)
    assert made.report().cache is None and "kept in" not in str(made.report())
    assert_equal(made(x), model, x)
    assert seen and not seen[0].exists()


def test_two_processes_may_make_one_entry(tmp_path):
    first, second = caches.Entry(tmp_path, "key"), caches.Entry(tmp_path, "key")
    for entry in (first, second):
        (entry.working() / "file").write_text("")
    for entry in (first, second):
        entry.finish({"a": 1})
    assert second.read() == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["key"]
