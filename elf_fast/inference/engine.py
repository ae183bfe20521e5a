"""`Engine`: a network with exits on the fastest code for each part and batch size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, ops
from ..base import ELFOutput
from ..modules import ELF
from .code import Code
from .exits import Exits
from .frozen import Frozen
from .parts import Example, Part, example_rows
from .report import Report

__all__ = ["Engine", "StageResult"]


class StageResult(NamedTuple):
    """What one stage and its exit give for n samples; see `Engine.run_stage`."""

    #: [n, ...] for the next stage; None at the last exit. May share memory with the input.
    features: Tensor | None
    logits: Tensor  # [n, C] of those that leave; other rows hold no values
    prediction: Tensor  # [n] int64, likewise
    confidence: Tensor  # [n] float32, likewise
    survivors: Tensor  # [k] int64, ascending: the samples that go on


class _Workspace:
    """Memory that one call uses and the next call uses again."""

    def __init__(self, boundaries: Sequence[Tensor]) -> None:
        self._boundaries = boundaries  # one sample of each part's input
        self._batches: list[Tensor | None] = [None] * len(boundaries)
        self._capacity = 0
        self.count = torch.zeros((), dtype=torch.int64, device=boundaries[0].device)
        on_cpu = self.count.device.type == "cpu"
        #: The number of survivors that an exit wrote. Waits for the device.
        self.survivor_count = self.count.numpy().item if on_cpu else self.count.item

    def fit(self, n: int) -> None:
        """Makes room for n samples, in powers of two."""
        if n > self._capacity:
            self._capacity = 1 << (n - 1).bit_length()
            self._batches = [None] * len(self._batches)
            made = torch.empty(3, self._capacity, dtype=torch.int64, device=self.count.device)
            self.survivors, *self.rows = made.unbind(0)

    def batch(self, e: int, n: int) -> Tensor:
        """[n, ...] memory for the input of part e."""
        held = self._batches[e]
        if held is None:
            held = self._batches[e] = ops.empty_batch(self._boundaries[e], self._capacity)
        return held if n == self._capacity else held[:n]


class Engine:
    """A callable x [N, ...] -> `ELFOutput`, equal to `model.eval()(x)` within rounding; made by
    `compile`.

    Thresholds, temperatures and criterion are read from the model at every call. Weights are
    copies; a call raises if those of the model have changed since. Several threads may call at
    once. The results carry no gradients. Autocast around a call has no effect.
    """

    def __init__(
        self,
        model: ELF,
        parts: Sequence[Part],
        examples: Sequence[Example],
        codes: Sequence[Sequence[Code]],
        plain: Sequence[Code],
        report: Report,
        max_batch: int,
        frozen: Frozen,
    ) -> None:
        """codes[e][n]: the code of part e for n samples. plain[e]: code that keeps NaN."""
        self.model = model
        self.max_batch = max_batch
        self._report = report
        self._runs = [[code.run for code in of_part] for of_part in codes]
        self._plain = [[code.run] * (max_batch + 1) for code in plain]
        self._is_compiled = any(
            set(of_part) != {p} for of_part, p in zip(codes, plain, strict=True)
        )
        self._frozen = frozen
        #: One sample of each part's input, in its memory format.
        self._boundaries = [example_rows(example.x, 1) for example in examples]
        self._input_shape, self._device = examples[0].x.shape[1:], examples[0].x.device
        self._strides = [tuple(ops.batch_strides(x)) for x in self._boundaries]
        self._classes = examples[-1].results[-1].shape[1]
        classifier = parts[0].classifier
        self._dtype = (examples[0].results[-1] if classifier is None else classifier[0]).dtype
        self._exits = Exits(model, parts, self._dtype)
        self._owns_input = not all(
            keeps_input(code.run, example_rows(examples[0].x, code.batch or 2))
            for code in {*codes[0], plain[0]}
        )
        self._spaces: list[_Workspace] = []

    @property
    def stages(self) -> int:
        """E, the number of stages and exits."""
        return len(self._boundaries)

    def report(self) -> Report:
        """What serves each stage at which batch sizes, and why."""
        return self._report

    def close(self) -> None:
        """Frees code, weights and memory. Later calls raise RuntimeError."""
        self._runs, self._plain, self._spaces = [], [], []
        self._exits = Exits(self.model, [], self._dtype)

    def __call__(self, x: Tensor) -> ELFOutput:
        """Runs a batch.

        Args:
            x: [N, ...], shape and dtype of a sample as in `example_input`; N may be anything. More
                than `max_batch` samples run in several batches.

        Raises:
            RuntimeError: the engine is closed, or weights of the model have changed.
            ValueError, TypeError: naming the argument.
        """
        self._check(x)
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self(x)
        N = x.shape[0]
        if self.max_batch >= N:
            return self._run(x)
        outputs = [self._run(piece) for piece in x.split(self.max_batch)]
        logits, prediction, confidence, exit_index = (
            torch.cat([getattr(out, name) for out in outputs]) for name in ELFOutput._fields[:4]
        )
        return ELFOutput(logits, prediction, confidence, exit_index, None)

    def run_stage(self, e: int, x: Tensor) -> StageResult:
        """Stage e and its exit alone, for callers that make up the batches themselves.

        Args:
            e: 0 <= e < `stages`.
            x: [n, ...] input of the stage, 1 <= n <= `max_batch`, in the memory format of
                `stage_input(e, n)`. The stage may overwrite it.

        Raises:
            RuntimeError: the engine is closed, or (for e = 0) weights of the model have changed.
            ValueError: e is out of range, or x has another shape, dtype, device or memory format.
        """
        self._check_open()
        checks.integer("e", e, 0, self.stages - 1)
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.run_stage(e, x)
        if e == 0:
            self._frozen.check()
        n = self._check_stage_input(e, x)
        out = self._empty_outputs(n)
        space = self._take(n)
        try:
            with torch.inference_mode():
                results = self._codes_for(x)[e][n](x)
                places = (out.logits, out.confidence, out.prediction, out.exit_index)
                outputs = (*places, space.survivors, space.rows[0], space.count)
                self._exits.current()[e](results[-1], None, outputs)
                k = int(space.survivor_count())
                survivors = space.survivors[:k].clone()
        finally:
            self._spaces.append(space)
        features = None if e == self.stages - 1 else results[0]
        return StageResult(features, out.logits, out.prediction, out.confidence, survivors)

    def stage_input(self, e: int, n: int) -> Tensor:
        """Uninitialised memory [n, ...] for inputs of stage e."""
        return ops.empty_batch(self._boundaries[e], n)

    def stage_code(self, e: int, n: int) -> Callable[[Tensor], Sequence[Tensor]]:
        """The code of stage e for n samples, without its exit: x [n, ...] in the memory format of
        `stage_input` -> [features, and what the head computes before pool and classifier]. It may
        overwrite x."""
        self._check_open()
        return self._runs[e][n]

    def _check_stage_input(self, e: int, x: Tensor) -> int:
        like, n = self._boundaries[e], len(x)
        fits = 1 <= n <= self.max_batch and x.dtype == like.dtype and x.device == like.device
        first = 0 if n > 1 else 1  # the stride between samples means nothing for one sample
        fits = fits and x.stride()[first:] == self._strides[e][first:]
        if not fits or x.shape[1:] != like.shape[1:]:
            raise ValueError(
                f"x: expected [1 to {self.max_batch}, {', '.join(map(str, like.shape[1:]))}] as "
                f"stage_input({e}, n) makes it, got {checks.describe(x)} with strides "
                f"{list(x.stride())}"
            )
        return n

    def _check_open(self) -> None:
        if not self._runs:
            raise RuntimeError("engine: expected an open engine, got a closed one")

    def _check(self, x: Any) -> None:
        self._check_open()
        like = self._boundaries[0]
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {checks.describe(x)}")
        if x.dtype != like.dtype or not x.dim() or x.shape[1:] != self._input_shape:
            raise ValueError(
                f"x: expected a {str(like.dtype).removeprefix('torch.')} tensor of shape "
                f"[N, {', '.join(map(str, like.shape[1:]))}], as the example that the engine was "
                f"compiled for, got {checks.describe(x)}"
            )
        if x.device != self._device:
            checks.same_device("x", x, self._device)
        self._frozen.check()

    def _run(self, x: Tensor) -> ELFOutput:
        N = x.shape[0]
        out = self._empty_outputs(N)
        if N == 0:
            return out
        space = self._take(N)
        try:
            with torch.inference_mode():
                self._run_stages(x, out, space)
        finally:
            self._spaces.append(space)
        return out

    def _run_stages(self, x: Tensor, out: ELFOutput, space: _Workspace) -> None:
        rows, n = None, x.shape[0]
        places = (out.logits, out.confidence, out.prediction, out.exit_index)
        exits = self._exits.current()
        x = self._own(x, space)
        for e, (runs, take_exit) in enumerate(zip(self._codes_for(x), exits, strict=True)):
            results = runs[n](x)
            x = results[0]
            next_rows = space.rows[e % 2]
            take_exit(results[-1], rows, (*places, space.survivors, next_rows, space.count))
            kept = int(space.survivor_count())
            if not kept:
                return
            if kept < n or rows is not None:
                rows = next_rows[:kept]  # the next exit writes into the other memory for rows
            if kept < n:
                batch = space.batch(e + 1, kept)
                ops.compact_into(batch, x, space.survivors[:kept], None)
                x, n = batch, kept

    def _codes_for(self, x: Tensor) -> list[list[Callable[[Tensor], Sequence[Tensor]]]]:
        """By part and batch size. Compiled code makes 0 of NaN where it fuses ReLU into a
        convolution, and a sample with NaN must not leave early, so a batch with values that are not
        finite runs in plain PyTorch."""
        if self._is_compiled and not math.isfinite(x.sum(dtype=torch.float32).item()):
            return self._plain
        return self._runs

    def _own(self, x: Tensor, space: _Workspace) -> Tensor:
        """x in the memory format of the first part, and apart from the caller's memory if that part
        writes into its input or returns it."""
        strides, wanted, N = x.stride(), self._strides[0], x.shape[0]
        is_alike = strides == wanted or (N == 1 and strides[1:] == wanted[1:])
        if is_alike and not self._owns_input:
            return x
        return space.batch(0, N).copy_(x)

    def _empty_outputs(self, N: int) -> ELFOutput:
        device = self._device
        return ELFOutput(
            torch.empty(N, self._classes, dtype=self._dtype, device=device),
            torch.empty(N, dtype=torch.int64, device=device),
            torch.empty(N, dtype=torch.float32, device=device),
            torch.empty(N, dtype=torch.int64, device=device),
            None,
        )

    def _take(self, n: int) -> _Workspace:
        try:
            space = self._spaces.pop()
        except IndexError:
            space = _Workspace(self._boundaries)
        space.fit(n)
        return space


def keeps_input(run: Callable[[Tensor], Sequence[Tensor]], x: Tensor) -> bool:
    """Whether code leaves its input as it is, and returns no view of it. Of floating x only shape
    and format count: values of either sign, far from 0, show operations such as ReLU in place."""
    if x.is_floating_point():
        generator = torch.Generator(x.device).manual_seed(0)
        x = torch.empty_like(x).normal_(0, 100, generator=generator)
    given = x.clone(memory_format=torch.preserve_format)
    with torch.inference_mode():
        results = run(given)
    storage = given.untyped_storage().data_ptr()
    return torch.equal(given, x) and all(r.untyped_storage().data_ptr() != storage for r in results)
