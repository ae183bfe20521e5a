"""Rivals: what a user could run instead of `elf_fast.ELF` at inference, on the same stages and
heads.

Each one takes an `InferenceWork` and returns a function without arguments, to be called under
`torch.inference_mode()`. That function returns the predictions [N] and exit indices [N] in the
order of the input. The criterion is "confidence" in all of them. `elf_fast.bench.inference` has the
other candidates: the module itself, its reference, the network without exits and the oracle.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from elf_fast.bench.workload import InferenceWork

Rival = Callable[[], tuple[Tensor, Tensor]]


def _confident(logits: Tensor, threshold: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """(whether each row leaves, its prediction). Tests max p >= t without computing the softmax."""
    logits = logits.float()
    top, prediction = logits.max(1)
    log_p = top / temperature - torch.logsumexp(logits / temperature, 1)
    return log_p >= threshold.log(), prediction


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index]. On channels-last features index_select takes ten times as long as on their
    contiguous view [N, H, W, D], so the view is used."""
    if _layout(x) == torch.channels_last:
        return x.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return x.index_select(0, index)


#: Runs a stage, its head and its exit test on an input that `Select` or the caller gives. Returns
#: features, whether each row leaves (None at the last exit) and predictions.
Step = Callable[[Any], tuple[Tensor, Tensor | None, Tensor]]
#: Makes the input of stage e from the features of the previous stage and the rows that go on.
Select = Callable[[int, Tensor, Tensor], Any]


def _leaving(images: Tensor, first: Any, steps: Sequence[Step], select: Select) -> Rival:
    """Early exit in plain PyTorch. An exit takes two writes by index, one list of indices and one
    selection. The host synchronises with the device once an exit, to know how many rows go on."""

    def run() -> tuple[Tensor, Tensor]:
        prediction = torch.empty(len(images), dtype=torch.int64, device=images.device)
        exit_index = torch.empty_like(prediction)
        x, alive = first, None
        for e, step in enumerate(steps):
            features, leaves, found = step(x)
            # A later exit overwrites these values for the samples that go on.
            if alive is None:
                prediction.copy_(found)
                exit_index.fill_(e)
            else:
                prediction.index_copy_(0, alive, found)
                exit_index.index_fill_(0, alive, e)
            if leaves is None:
                break
            goes_on = (~leaves).nonzero().squeeze(1)
            if len(goes_on) == 0:
                break
            if len(goes_on) < len(leaves):
                alive = goes_on if alive is None else alive[goes_on]
            x = select(e + 1, features, goes_on)
        return prediction, exit_index

    return run


def _step(work: InferenceWork, e: int) -> Step:
    model = work.model

    def step(x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        features = model.stages[e](x)
        logits = model.heads[e](features)
        if e == len(model.stages) - 1:
            return features, None, logits.argmax(1)
        return features, *_confident(logits, model.thresholds[e], model.temperatures[e])

    return step


def tuned_torch(work: InferenceWork) -> Rival:
    """Tuned PyTorch: the best that a good PyTorch programmer writes without kernels of their own
    and without CUDA graphs."""

    def select(e: int, features: Tensor, rows: Tensor) -> Tensor:
        return features if len(rows) == len(features) else _rows(features, rows)

    steps = [_step(work, e) for e in range(len(work.model.stages))]
    return _leaving(work.images, work.images, steps, select)


class _GraphedStage:
    """A step as one CUDA graph for each batch size in `sizes`, which ascend. The graphs read the
    first rows of `images`, which the caller fills. A batch uses the next larger size; the rows
    behind it hold values of earlier batches, and their results are ignored. Without a GPU the step
    runs as it is."""

    def __init__(self, step: Step, images: Tensor, sizes: Sequence[int]) -> None:
        self.images, self.sizes = images, sizes
        # The graphs can share memory: a graph's results are read before the next one runs.
        self._pool = torch.cuda.graph_pool_handle() if images.is_cuda else None
        self._runs = [self._captured(step, images[:size]) for size in sizes]

    def _captured(self, step: Step, x: Tensor) -> Callable[[], tuple]:
        if not x.is_cuda:
            return lambda: step(x)
        for _ in range(3):  # in the first calls libraries choose their kernels
            step(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=torch.cuda.current_stream()):
            results = step(x)

        def replay() -> tuple:
            graph.replay()
            return results

        return replay

    def __call__(self, n: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """The step on the first n images."""
        features, leaves, found = self._runs[bisect_left(self.sizes, n)]()
        return features, None if leaves is None else leaves[:n], found[:n]


def tuned_torch_graphed(work: InferenceWork) -> Rival:
    """`tuned_torch` with CUDA graphs. Every stage with its head and exit test is a graph for each
    eighth of the batch, and the survivors are selected into the input of the next graph."""
    N = len(work.images)
    eighths = sorted({-(-N * k // 8) for k in range(1, 9)})
    with torch.inference_mode():
        stages, sizes, inputs = [], [N], work.images
        for e, stage in enumerate(work.model.stages):
            stages.append(_GraphedStage(_step(work, e), inputs, sizes))
            like = stage(inputs[:1])
            inputs = like.new_zeros(N, *like.shape[1:]).contiguous(memory_format=_layout(like))
            sizes = eighths

    def select(e: int, features: Tensor, rows: Tensor) -> int:
        _select_into(stages[e].images, features, rows)
        return len(rows)

    return _leaving(work.images, N, stages, select)


def _layout(x: Tensor) -> torch.memory_format:
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _select_into(out: Tensor, x: Tensor, index: Tensor) -> None:
    """Writes x[index] into the first rows of out; channels-last as in `_rows`."""
    if _layout(x) == torch.channels_last:
        x, out = x.permute(0, 2, 3, 1), out.permute(0, 2, 3, 1)
    torch.index_select(x, 0, index, out=out[: len(index)])


def padded(work: InferenceWork) -> Rival:
    """Early exit that drops no sample: every stage gets the whole batch. It does not synchronise,
    so a single CUDA graph can hold it."""
    model, images = work.model, work.images
    last = len(model.stages) - 1

    def run() -> tuple[Tensor, Tensor]:
        prediction = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        exit_index = torch.full_like(prediction, last)
        here = torch.ones_like(prediction, dtype=torch.bool)
        x = images
        for e, (stage, head) in enumerate(zip(model.stages, model.heads, strict=True)):
            x = stage(x)
            logits = head(x)
            if e == last:
                leaves, found = here, logits.argmax(1)
            else:
                leaves, found = _confident(logits, model.thresholds[e], model.temperatures[e])
                leaves = leaves & here
            prediction = torch.where(leaves, found, prediction)
            exit_index = torch.where(leaves, e, exit_index)
            here = here & ~leaves
        return prediction, exit_index

    return run


def _wrapped(work: InferenceWork) -> Any:
    """A copy of the stages and heads in a wrapper of `earlyon`, which adds hooks to them."""
    from earlyon import EarlyExitConfig, EarlyExitWrapper, ExitPoint

    model = copy.deepcopy(work.model)
    with torch.inference_mode():
        num_classes = model(work.images[:1]).logits.shape[1]
    last = len(model.stages) - 1
    names = [f"exit{e}" for e in range(last)]
    config = EarlyExitConfig(
        backbone="stages",
        num_classes=num_classes,
        exit_points=[ExitPoint(name, str(e), 1) for e, name in enumerate(names)],
        # earlyon accepts thresholds in [0, 1]; an exit with a larger one is disabled instead.
        confidence_thresholds=[min(float(t), 1.0) for t in model.thresholds],
        enabled_exits=[bool(t <= 1.0) for t in model.thresholds],
        temperatures={
            **{name: float(t) for name, t in zip(names, model.temperatures, strict=True)},
            "final": 1.0,
        },
    )
    wrapper = EarlyExitWrapper(
        nn.Sequential(*model.stages), dict(zip(names, model.heads[:-1], strict=True)),
        model.heads[-1], config, input_shape=tuple(work.images[:1].shape),
    )  # fmt: skip
    return wrapper.eval()


def earlyon_batched(work: InferenceWork) -> Rival:
    """earlyon's batched mode: the whole batch leaves where its least confident sample may leave."""
    wrapper, images, last = _wrapped(work), work.images, len(work.model.stages) - 1

    def run() -> tuple[Tensor, Tensor]:
        result = wrapper.forward_inference_batched(images)
        prediction = result.predictions.argmax(1)
        at = last if result.exit_taken < 0 else result.exit_taken
        return prediction, torch.full_like(prediction, at)

    return run


def earlyon_single(work: InferenceWork) -> Rival:
    """earlyon's default mode: one image at a time."""
    wrapper, images, last = _wrapped(work), work.images, len(work.model.stages) - 1

    def run() -> tuple[Tensor, Tensor]:
        results = [wrapper(image[None]) for image in images]
        prediction = torch.cat([r.prediction.argmax(1) for r in results])
        exits = [last if r.exit_taken < 0 else r.exit_taken for r in results]
        return prediction, torch.tensor(exits, device=images.device)

    return run


def check(rival: Rival, work: InferenceWork, *, exits: bool = True) -> None:
    """Compares a rival with the model.

    Args:
        exits: the rival must leave at the model's exits with the model's predictions. False: it may
            leave at another exit, and must have the predictions of that exit for the whole batch.

    Raises:
        RuntimeError: they differ.
    """
    with torch.inference_mode():
        prediction, exit_index = rival()
        expected = work.model(work.images)
        if exits:
            same = torch.equal(exit_index, expected.exit_index)
            same &= torch.equal(prediction, expected.prediction)
        else:
            x = work.images
            for stage in work.model.stages[: int(exit_index[0]) + 1]:
                x = stage(x)
            same = torch.equal(prediction, work.model.heads[int(exit_index[0])](x).argmax(1))
    if not same:
        raise RuntimeError(f"{rival.__qualname__}: wrong exits or predictions, so it is not timed")
