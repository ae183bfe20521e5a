"""Code for one part: plain PyTorch with folded BatchNorm, or code that inductor makes ahead of
time, for every batch size or for one."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .folding import fold
from .packing import packed_convolutions
from .parts import Example, Part, example_rows

__all__ = ["Code", "Unavailable", "build_package", "check", "eager", "load_package", "with_format"]

#: Largest error of a result, as a share of its largest value.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}

#: Batch sizes at which code for any size is compared with the model. A forward that decides on the
#: size is compiled as it decides for the example.
SIZES = (1, 2, 3, 33)

#: One thread compiles at a time: logging, warnings and inductor are changed meanwhile.
_compiling = threading.Lock()


class Unavailable(Exception):
    """This code cannot be made here, or gives other results than the model. The text says why."""


class Code(NamedTuple):
    name: str
    #: x [n, ...] in the part's memory format -> the results of `Part.forward`. May overwrite x.
    run: Callable[[Tensor], Sequence[Tensor]]
    #: The only n that `run` takes; None: any.
    batch: int | None = None


def eager(part: Part, example: Example) -> Code:
    """The part in plain PyTorch. Channels-last if it has convolutions."""
    x = example.x
    try:
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            part = part.to(memory_format=torch.channels_last)
        code = Code("eager", fold(part, x))
        check(code, part, example)
    except Exception:
        code = Code("eager", part)
    return with_format(code, example)


def build_package(part: Part, example: Example, path: Path, batch: int | None) -> None:
    """Compiles a part with inductor into a file that `load_package` reads.

    Raises:
        Unavailable: torch.export or inductor cannot take the part, or there is no compiler.
    """
    x = example_rows(example.x, len(example.x) if batch is None else batch)
    shapes = None if batch is not None else ({0: torch.export.Dim.DYNAMIC},)
    try:
        with (
            _compiling,
            torch.no_grad(),
            warnings.catch_warnings(),
            _quiet(),
            packed_convolutions(),
        ):
            warnings.simplefilter("ignore")
            program = torch.export.export(part, (x,), dynamic_shapes=shapes)
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(path), inductor_configs={"freezing": True}
            )
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Unavailable(f"{type(error).__name__}: {first}") from error


class _quiet:
    """Silences what torch.export and inductor log while they compile."""

    def __enter__(self) -> None:
        self._before = logging.root.manager.disable
        logging.disable(logging.WARNING)

    def __exit__(self, *args: object) -> None:
        logging.disable(self._before)


def load_package(path: Path, name: str, batch: int | None) -> Code:
    """The code of a file that `build_package` wrote.

    Raises:
        Unavailable: the file cannot be loaded.
    """
    try:
        run = torch._inductor.aoti_load_package(str(path)).loader.run
    except Exception as error:
        raise Unavailable(f"{type(error).__name__}: {error}") from error
    return Code(name, lambda x: run([x]), batch)


def with_format(code: Code, example: Example) -> Code:
    """The code with features in the memory format that the next part takes."""
    if example.next_strides is None:
        return code
    strides = example.next_strides
    with torch.inference_mode():
        sizes = SIZES if code.batch is None else (code.batch,)
        found = {n: code.run(example_rows(example.x, n))[0].stride() for n in sizes}
    if all(have[1:] == strides[1:] and (n == 1 or have == strides) for n, have in found.items()):
        return code
    run = code.run

    def converted(x: Tensor) -> Sequence[Tensor]:
        features, *rest = run(x)
        out = torch.empty_strided(features.shape, strides, dtype=features.dtype, device=x.device)
        return [out.copy_(features), *rest]

    return code._replace(run=converted)


def check(code: Code, part: Part, example: Example) -> None:
    """Runs code on a few batch sizes and compares the results with those of the part.

    Raises:
        Unavailable: they differ.
    """
    for n in SIZES if code.batch is None else (code.batch,):
        with torch.inference_mode():
            found = code.run(example_rows(example.x, n))
            expected = part(example_rows(example.x, n))
        for ours, theirs in zip(found, expected, strict=True):
            if not _agree(ours, theirs):
                raise Unavailable(f"gives other results than the model for {n} samples")


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    scale = theirs.double().abs().nan_to_num(0, 0, 0).amax().item()
    return torch.allclose(
        ours.double(), theirs.double(), rtol=0, equal_nan=True,
        atol=TOLERANCE.get(theirs.dtype, 1e-3) * max(scale, 1e-30),
    )  # fmt: skip
