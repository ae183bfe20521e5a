"""`compile`: an `Engine` of a model."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, reference
from ..modules import ELF
from .cache import Entry, default_folder, key_of
from .choice import Times, choose, measure, sizes_to_time
from .code import Code, Unavailable, build_package, check, eager, load_package, with_format
from .engine import Engine
from .parts import Example, Part, example_rows, examples, parts_of
from .report import Report

__all__ = ["ENGINES", "compile"]

ENGINES = ("auto", "eager", "inductor")


def compile(
    model: ELF,
    example_input: Tensor,
    *,
    engine: str = "auto",
    max_batch: int = 256,
    buckets: Sequence[int] | None = None,
    cache_dir: str | Path | None = None,
) -> Engine:
    """A callable that computes `model.eval()(x)` on the fastest code there is on this machine.

    Args:
        model: an `ELF`. Its weights are copied; thresholds, temperatures and criterion are read at
            every call of the engine.
        example_input: [N, ...], samples of the shape and dtype that the engine will get, on the
            model's device; N >= 1. The values matter only for checks: code that gives other results
            on them than the model is not used.
        engine: "eager" (PyTorch with folded BatchNorm, channels-last), "inductor" (compiled ahead
            of time; needs a C++ compiler, and takes 5 to 30 seconds per stage), or "auto": both are
            timed, and each stage runs on the faster one for the batch size at hand.
        max_batch: the largest batch that runs at once; a larger one is split.
        buckets: batch sizes for which inductor makes code of their own; other sizes share code.
            None: 1.
        cache_dir: where compiled code and times are kept, so that a later call takes seconds. None:
            elf_fast/engines in the user's cache folder. It may be filled ahead of time on a machine
            with the same processor, and copied.

    Raises:
        TypeError, ValueError: naming the argument. The model mixes samples in evaluation: results
            of a sample depend on the others in its batch.
        RuntimeError: "inductor" cannot compile the model. "auto" then runs eagerly, and
            `report()` says why.

    Example:
        >>> engine = compile(model, torch.randn(8, 3, 224, 224))
        >>> engine(images).prediction  # [N]
        >>> print(engine.report())
    """
    _check_arguments(model, example_input, engine, max_batch)
    buckets = _checked_buckets(buckets, max_batch)
    with torch.inference_mode(False), torch.no_grad():
        x = example_input.detach().clone(memory_format=torch.preserve_format)
        parts = parts_of(model)
        found = examples(parts, example_rows(x, 3))
        return _compiled(model, parts, found, engine, max_batch, buckets, cache_dir)


def _compiled(
    model: ELF,
    parts: list[Part],
    found: list[Example],
    engine: str,
    max_batch: int,
    buckets: tuple[int, ...],
    cache_dir: str | Path | None,
) -> Engine:
    compiles = engine != "eager" and found[0].x.device.type == "cpu"
    if engine == "inductor" and not compiles:
        raise ValueError(
            f"engine: expected auto or eager for a model on {found[0].x.device}, got inductor, "
            "which compiles for the CPU only"
        )
    by_part = [[eager(part, example)] for part, example in zip(parts, found, strict=True)]
    if not compiles:
        unavailable = () if engine == "eager" else ("inductor: compiles for the CPU only",)
        return _engine(model, parts, found, by_part, Report(engine, (), unavailable), max_batch)
    root = default_folder() if cache_dir is None else Path(cache_dir)
    entry = Entry(root, key_of(parts, found, [engine, max_batch, buckets]))
    report = Report(engine, (), cache=str(entry.path))
    candidates = [[] if engine == "inductor" else codes for codes in by_part]
    kept = _loaded(entry, parts, found)
    if kept is not None:
        report = replace(report, from_cache=True, unavailable=kept.unavailable)
    else:
        with closing(entry), progress(len(parts) * (2 + len(buckets))) as step:
            kept = _built(entry, parts, found, engine, max_batch, buckets, candidates, step)
        report = replace(report, unavailable=kept.unavailable)
    both = [a + b for a, b in zip(candidates, kept.codes, strict=True)]
    return _engine(model, parts, found, both, report, max_batch, kept.times)


class _Kept(NamedTuple):
    """What the cache keeps of an engine."""

    codes: list[list[Code]]  # of each part, compiled by inductor
    times: list[Times]  # of each part
    unavailable: tuple[str, ...]


def _engine(
    model: ELF,
    parts: list[Part],
    found: list[Example],
    codes: list[list[Code]],
    report: Report,
    max_batch: int,
    times: Sequence[Times] | None = None,
) -> Engine:
    tables, rows = [], []
    for e, of_part in enumerate(codes):
        table, said = choose(e, of_part, times[e] if times else {}, max_batch)
        tables.append(table)
        rows.extend(said)
    return Engine(model, parts, found, tables, replace(report, stages=tuple(rows)), max_batch)


def _loaded(entry: Entry, parts: list[Part], found: list[Example]) -> _Kept | None:
    """What the entry holds. None: nothing, or something that does not fit the model."""
    about = entry.read()
    if about is None or entry.path is None:
        return None
    try:
        codes = [
            [_code(entry.path, e, batch, parts[e], found[e]) for batch in about["batches"][e]]
            for e in range(len(parts))
        ]
        times = [{int(n): dict(ms) for n, ms in of_part.items()} for of_part in about["times"]]
        return _Kept(codes, times, tuple(map(str, about["unavailable"])))
    except (Unavailable, KeyError, IndexError, TypeError, ValueError):
        return None


def _code(folder: Path, e: int, batch: int | None, part: Part, example: Example) -> Code:
    name = "inductor" if batch is None else f"inductor for {batch}"
    code = load_package(folder / _file(e, batch), name, batch)
    check(code, part, example)
    return with_format(code, example)


def _file(e: int, batch: int | None) -> str:
    return f"stage{e}-{'any' if batch is None else batch}.pt2"


def _built(
    entry: Entry,
    parts: list[Part],
    found: list[Example],
    engine: str,
    max_batch: int,
    buckets: tuple[int, ...],
    others: list[list[Code]],
    step: Callable[[str], None],
) -> _Kept:
    """Compiles and times every part, and keeps what serves in the entry."""
    folder = entry.working()
    kept = _Kept([], [], ())
    batches, unavailable = [], []
    for e, (part, example) in enumerate(zip(parts, found, strict=True)):
        codes = []
        for batch in (None, *buckets):
            size = "any size" if batch is None else str(batch)
            step(f"stage {e}: compiling for batches of {size}")
            try:
                build_package(part, example, folder / _file(e, batch), batch)
                codes.append(_code(folder, e, batch, part, example))
            except Unavailable as reason:
                unavailable.append(f"stage {e}, inductor for batches of {size}: {reason}")
                if engine == "inductor" and batch is None:
                    raise RuntimeError(
                        f"engine: inductor cannot serve stages[{e}]: {reason}"
                    ) from reason
        step(f"stage {e}: timing")
        candidates = others[e] + codes
        sizes = sizes_to_time(max_batch, buckets) if len(candidates) > 1 else []
        times = {n: measure(candidates, example, n) for n in sizes}
        table, _ = choose(e, candidates, times, max_batch)
        kept.codes.append([code for code in codes if code in table])
        kept.times.append(times)
        batches.append([code.batch for code in kept.codes[-1]])
        for code in codes:
            if code not in table:
                (folder / _file(e, code.batch)).unlink()
    about = {"batches": batches, "times": kept.times, "unavailable": unavailable}
    entry.finish(about)
    return kept._replace(unavailable=tuple(unavailable))


@contextlib.contextmanager
def progress(steps: int) -> Iterator[Callable[[str], None]]:
    """A function that shows the next step, on a bar on a terminal if rich is installed."""
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        yield lambda text: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("compiling", total=steps)

        def step(text: str) -> None:
            bar.update(task, description=text, advance=1)

        yield step


def _check_arguments(model: Any, example_input: Any, engine: Any, max_batch: Any) -> None:
    if not isinstance(model, ELF):
        hint = "; elf_fast.fuse makes one" if isinstance(model, reference.ELF) else ""
        raise TypeError(f"model: expected an elf_fast.ELF, got {type(model).__name__}{hint}")
    checks.tensor("example_input", example_input)
    if example_input.dim() < 1 or len(example_input) < 1:
        raise ValueError(
            "example_input: expected a batch [N, ...] with N >= 1, "
            f"got {checks.describe(example_input)}"
        )
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
    checks.integer("max_batch", max_batch, 1, 2**20)


def _checked_buckets(buckets: Any, max_batch: int) -> tuple[int, ...]:
    if buckets is None:
        return (1,)
    if isinstance(buckets, str) or not isinstance(buckets, Sequence):
        raise TypeError(f"buckets: expected batch sizes, got {checks.describe(buckets)}")
    for n in buckets:
        checks.integer("buckets", n, 1, max_batch)
    return tuple(sorted(set(buckets)))
