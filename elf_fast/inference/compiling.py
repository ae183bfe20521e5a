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
from ..memory import is_out_of_memory
from ..modes import mode
from ..modules import ELF
from .cache import Entry, default_folder, key_of
from .choice import Times, choose, measure, sizes_to_time
from .code import Code, Unavailable, build_package, check, eager, load_package, with_format
from .engine import Engine
from .frozen import Frozen
from .parts import Example, Part, different_rows, examples, parts_of
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
            elf_fast/engines in the user's cache folder, or nowhere if that is read-only. It may be
            filled ahead of time on a machine with the same processor, and copied.

    Raises:
        TypeError, ValueError: naming the argument. The model mixes samples in evaluation: results
            of a sample depend on the others in its batch.
        RuntimeError: "inductor" cannot compile the model. "auto" then runs eagerly, and
            `report()` says why.

    Examples:
        >>> engine = compile(model, torch.randn(8, 3, 224, 224))
        >>> engine(images).prediction  # [N]
        >>> print(engine.report())
    """
    _check_arguments(model, example_input, engine, max_batch)
    buckets = _checked_buckets(buckets, max_batch)
    device = example_input.device.type
    outside_autocast = torch.autocast(device, enabled=False)
    with torch.inference_mode(False), torch.no_grad(), outside_autocast:
        frozen = Frozen(model)  # before the copies, so that changes while it compiles are noticed
        x = different_rows(example_input.detach(), 3)
        _check_model(model, x)
        parts = parts_of(model)
        found = examples(parts, x)
        network = _Network(model, parts, found, list(map(eager, parts, found)), frozen)
        return _engine(network, engine, max_batch, buckets, cache_dir)


class _Network(NamedTuple):
    model: ELF
    parts: list[Part]
    found: list[Example]
    plain: list[Code]  # of each part
    frozen: Frozen


class _Compiled(NamedTuple):
    """What is compiled for a model, as the cache keeps it."""

    batches: list[list[int | None]]  # of each part: the only batch size of each package, or None
    times: list[Times]  # of each part
    unavailable: list[str]


def _engine(
    network: _Network,
    engine: str,
    max_batch: int,
    buckets: tuple[int, ...],
    cache_dir: str | Path | None,
) -> Engine:
    parts, found = network.parts, network.found
    report = Report(engine, ())
    if engine == "eager" or found[0].x.device.type != "cpu":
        if engine == "inductor":
            raise ValueError(
                f"engine: expected auto or eager for a model on {found[0].x.device}, got inductor, "
                "which compiles for the CPU only"
            )
        reasons = ["inductor: compiles for the CPU only"] if engine == "auto" else []
        nothing = _Compiled([[] for _ in parts], [{} for _ in parts], reasons)
        return _assembled(network, report, max_batch, nothing, None)
    key = key_of(parts, found, [max_batch, buckets])
    entry = Entry(default_folder() if cache_dir is None else Path(cache_dir), key)
    report = replace(report, cache=str(entry.path))
    kept = _read(entry, len(parts))
    if kept is not None:
        try:
            known = replace(report, from_cache=True)
            return _assembled(network, known, max_batch, kept, entry.path)
        except Unavailable:  # damaged, or of a model that only looks the same
            pass
    try:
        entry.working()
    except OSError as error:
        if cache_dir is not None:
            raise OSError(f"cache_dir: cannot write to {cache_dir}: {error}") from error
        entry, report = Entry(None, key), replace(report, cache=None)
    with closing(entry), progress(len(parts) * (2 + len(buckets))) as step:
        kept = _built(entry.working(), network, max_batch, buckets, step)
        has_code = any(kept.batches)  # or there may be a compiler the next time
        report = report if has_code else replace(report, cache=None)
        folder = entry.working()  # loaded from here, because other processes may make the entry
        made = _assembled(network, report, max_batch, kept, folder)
        if has_code:
            entry.finish(kept._asdict())
        return made


def _assembled(
    network: _Network,
    report: Report,
    max_batch: int,
    kept: _Compiled,
    folder: Path | None,
) -> Engine:
    """The engine of the codes that serve; only those are loaded."""
    model, parts, found, plain, frozen = network
    tables, rows = [], []
    for e, (part, example) in enumerate(zip(parts, found, strict=True)):
        codes: dict[str, int | None] = {} if report.engine == "inductor" else {"eager": None}
        codes |= {_name(batch): batch for batch in kept.batches[e]}
        if None not in codes.values():
            reasons = [text for text in kept.unavailable if text.startswith(f"stage {e},")]
            raise RuntimeError(f"engine: inductor cannot serve every stage: {'; '.join(reasons)}")
        names, said = choose(e, codes, kept.times[e], max_batch)
        loaded = {"eager": plain[e]}
        for name in set(names) - {"eager"}:
            assert folder is not None
            loaded[name] = _code(folder, e, codes[name], part, example)
        tables.append([loaded[name] for name in names])
        rows.extend(said)
    report = replace(report, stages=tuple(rows), unavailable=tuple(kept.unavailable))
    return Engine(model, parts, found, tables, plain, report, max_batch, frozen)


def _read(entry: Entry, parts: int) -> _Compiled | None:
    """What the cache holds. None: nothing that can be used."""
    about: Any = entry.read()
    try:
        kept = _Compiled(
            [list(batches) for batches in about["batches"]],
            [{int(n): dict(ms) for n, ms in times.items()} for times in about["times"]],
            list(map(str, about["unavailable"])),
        )
    except (TypeError, KeyError, ValueError, AttributeError):
        return None
    return kept if len(kept.batches) == len(kept.times) == parts else None


def _built(
    folder: Path,
    network: _Network,
    max_batch: int,
    buckets: tuple[int, ...],
    step: Callable[[str], None],
) -> _Compiled:
    """Compiles every part into files of the folder, and times the codes."""
    kept = _Compiled([], [], [])
    for e, (part, example) in enumerate(zip(network.parts, network.found, strict=True)):
        codes = [network.plain[e]]
        for batch in (None, *buckets):
            size = "any size" if batch is None else str(batch)
            step(f"stage {e}: compiling for batches of {size}")
            try:
                build_package(part, example, folder / _file(e, batch), batch)
                codes.append(_code(folder, e, batch, part, example))
            except Unavailable as reason:
                kept.unavailable.append(f"stage {e}, inductor for batches of {size}: {reason}")
        step(f"stage {e}: timing")
        kept.batches.append([code.batch for code in codes[1:]])
        sizes = sizes_to_time(max_batch, buckets) if len(codes) > 1 else []
        kept.times.append({n: measure(codes, example, n) for n in sizes})
    return kept


def _code(folder: Path, e: int, batch: int | None, part: Part, example: Example) -> Code:
    code = load_package(folder / _file(e, batch), _name(batch), batch)
    check(code, part, example)
    return with_format(code, example)


def _name(batch: int | None) -> str:
    return "inductor" if batch is None else f"inductor for {batch}"


def _file(e: int, batch: int | None) -> str:
    return f"stage{e}-{'any' if batch is None else batch}.pt2"


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


def _check_model(model: ELF, x: Tensor) -> None:
    """Runs the model once: its own checks come before those of parts."""
    try:
        with mode(model, training=False):
            model(x.clone(memory_format=torch.preserve_format))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            "example_input: expected a batch that the model takes in evaluation, got "
            f"{checks.describe(x)}, for which it raises {type(error).__name__}: {error}"
        ) from error


def _check_arguments(model: Any, example_input: Any, engine: Any, max_batch: Any) -> None:
    if not isinstance(model, ELF):
        hint = "; elf_fast.fuse makes one" if isinstance(model, reference.ELF) else ""
        raise TypeError(f"model: expected an elf_fast.ELF, got {type(model).__name__}{hint}")
    checks.example_input(example_input)
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
