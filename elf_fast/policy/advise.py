"""Whether early exits pay on this machine: a network with exits timed beside its alternatives.

The exit shares come from calibration. The times are those of an engine of `inference.compile` on
a short stream of images of which that share leaves at each exit, shuffled and cut into batches, so
the number that leaves differs from batch to batch, as it does for unsorted images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import checks, inference
from ..bench.engines import without_exits
from ..bench.workload import going_on, inference_work
from ..modules import ELF
from ..timing import Quartiles, sample

__all__ = ["Advice", "Rival", "Row", "Verdict", "advise"]

EXITS, WHOLE = "the exits", "the whole network"
#: Different images that the stream is made of, images in the stream, and batches in it at least.
POOL, STREAM, BATCHES = 64, 64, 2
#: A network is called faster than another one if it saves at least this share of the time.
WORTH = 0.05


class Rival(NamedTuple):
    """Another network that could serve."""

    network: nn.Module  # images -> logits [N, C]; of an ELF only its last exit is used
    #: In [0, 1], on the images on which that of the model was measured; None: not known.
    accuracy: float | None = None


class Row(NamedTuple):
    """What is expected of a network at a batch size."""

    batch: int
    network: str
    ms: Quartiles  # per batch
    images_per_s: float


class Verdict(NamedTuple):
    batch: int
    use: str  # `EXITS`, `WHOLE` or the name of a rival
    why: str


@dataclass(frozen=True)
class Advice:
    """What to use at each batch size, and the times behind it. `print` it for a text."""

    rows: tuple[Row, ...]
    verdicts: tuple[Verdict, ...]
    exit_shares: tuple[float, ...]  # [E]
    engine: str
    device: str
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        found = asdict(self)
        found["rows"] = [{**row._asdict(), "ms": list(row.ms)} for row in self.rows]
        found["verdicts"] = [verdict._asdict() for verdict in self.verdicts]
        return found

    def __str__(self) -> str:
        shares = " / ".join(f"{share:.0%}" for share in self.exit_shares)
        lines = [
            f"engine {self.engine} on {self.device}, threads: {self.threads}; "
            f"{shares} of the images leave at each exit"
        ]
        for batch, use, why in self.verdicts:
            lines += ["", f"batches of {batch}: use {use}; {why}"]
            lines += [
                f"  {row.network:<24} {row.ms.median:9.3g} ms {row.images_per_s:9,.0f} images/s"
                for row in self.rows
                if row.batch == batch
            ]
        return "\n".join(lines)


def advise(
    model: ELF,
    example_input: Tensor,
    exit_shares: Sequence[float],
    *,
    batches: Sequence[int] = (1, 16, 64),
    engine: str = "auto",
    accuracy: float | None = None,
    accuracy_exits_off: float | None = None,
    rivals: Mapping[str, Rival] | None = None,
    seconds: float = 5.0,
) -> Advice:
    """Times the model with exits, without them, and its rivals, and says which to use.

    Args:
        example_input: [N, ...], a sample's shape and dtype, on the model's device. Values are not
            used.
        exit_shares: [E] share of the samples that leave at each exit, such as
            `[e.share.value for e in model.policy.measured.exits]`.
        batches: batch sizes.
        engine: of `inference.compile`, for all networks.
        accuracy, accuracy_exits_off: of the model with its exits and without, in [0, 1], on images
            that were not trained on. The text names them, and rivals are compared with the first.
        rivals: other networks by name.
        seconds: time to measure for each batch size.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    rivals = rivals or {}
    _check(
        model, example_input, exit_shares, batches, accuracy, accuracy_exits_off, rivals, seconds
    )
    generator = torch.Generator("cpu").manual_seed(0)
    shape = example_input.shape[1:]
    pool = torch.randn(POOL, *shape, generator=generator, device="cpu").to(example_input)
    work = inference_work(model, pool, going_on(exit_shares))
    by_exit = [(work.exit_index == e).nonzero().flatten() for e in range(len(exit_shares))]

    networks = {EXITS: work.model, WHOLE: without_exits(model)}
    for name, (network, _) in rivals.items():
        whole = network if isinstance(network, ELF) else ELF([network], [nn.Identity()])
        networks[name] = without_exits(whole)
    engines = {
        name: inference.compile(network, pool[:2], engine=engine, max_batch=max(batches))
        for name, network in networks.items()
    }
    rows, verdicts = [], []
    for N in batches:
        images = [pool[batch] for batch in _stream(by_exit, exit_shares, N, generator)]
        found = _measure(engines, images, seconds)
        rows += [Row(N, name, ms, 1e3 * N / ms.median) for name, ms in found.items()]
        verdicts.append(_verdict(N, found, accuracy, accuracy_exits_off, rivals))
    for each in engines.values():
        each.close()
    return Advice(
        tuple(rows), tuple(verdicts), tuple(map(float, exit_shares)), engine,
        str(example_input.device), torch.get_num_threads(),
    )  # fmt: skip


def _stream(
    by_exit: Sequence[Tensor], shares: Sequence[float], N: int, generator: torch.Generator
) -> list[Tensor]:
    """Batches [N] of indices into the pool, whose exits together follow `shares` as nearly as
    whole images can. by_exit: for each exit, the images of the pool that leave there; an exit
    without any, or that less than half an image of the stream takes, is not among them."""
    M = N * max(BATCHES, math.ceil(STREAM / N))
    present = [e for e, images in enumerate(by_exit) if len(images)]
    ends = torch.tensor([shares[e] for e in present], dtype=torch.float64, device="cpu").cumsum(0)
    if float(ends[-1]) <= 0:
        ends = torch.ones_like(ends)
    middles = (torch.arange(M, dtype=torch.float64, device="cpu") + 0.5) / M * ends[-1]
    exits = torch.searchsorted(ends, middles)[torch.randperm(M, generator=generator, device="cpu")]
    images = [by_exit[present[e]] for e in exits.tolist()]
    picked = torch.stack([own[i % len(own)] for i, own in enumerate(images)])
    return list(picked.split(N))


def _measure(
    engines: Mapping[str, inference.Engine], batches: Sequence[Tensor], seconds: float
) -> dict[str, Quartiles]:
    """Milliseconds per batch of each engine. An engine runs all batches before the next engine has
    its turn, so that its weights are in the caches, as they are when it serves."""

    def run(engine: inference.Engine) -> None:
        for x in batches:
            engine(x)

    candidates = {name: partial(run, engine) for name, engine in engines.items()}
    samples = sample(candidates, seconds=seconds)
    scale = 1e3 * len(batches)
    return {name: Quartiles(*(us / scale for us in samples.time(name))) for name in engines}


def _verdict(
    N: int,
    found: Mapping[str, Quartiles],
    accuracy: float | None,
    exits_off: float | None,
    rivals: Mapping[str, Rival],
) -> Verdict:
    ms = {name: times.median for name, times in found.items()}
    if ms[EXITS] <= (1 - WORTH) * ms[WHOLE]:
        use, why = EXITS, f"{ms[WHOLE] / ms[EXITS]:.2f} times as fast as without them"
    elif ms[EXITS] <= ms[WHOLE]:
        use, why = WHOLE, f"the exits save only {1 - ms[EXITS] / ms[WHOLE]:.0%} of the time"
    else:
        use, why = WHOLE, f"the exits need {ms[EXITS] / ms[WHOLE] - 1:.0%} more time"
    if accuracy is not None and exits_off is not None:
        why += f" ({_percent(accuracy)} right with exits, {_percent(exits_off)} without)"
    faster = [name for name in rivals if ms[name] <= (1 - WORTH) * ms[use]]
    good = [name for name in faster if _is_as_accurate(rivals[name].accuracy, accuracy)]
    if good:
        best = min(good, key=ms.__getitem__)
        why = (
            f"{ms[use] / ms[best]:.2f} times as fast as {use}, and no less accurate "
            f"({_percent(rivals[best].accuracy)}, {_percent(accuracy)} with exits)"
        )
        return Verdict(N, best, why)
    for name in faster:
        if rivals[name].accuracy is None or accuracy is None:
            goal = "that of the exits" if accuracy is None else _percent(accuracy)
            why += (
                f"; {name} is {ms[use] / ms[name]:.2f} times as fast as {use}, so use it if its "
                f"accuracy reaches {goal}"
            )
        else:
            why += f"; {name} is faster, but less accurate ({_percent(rivals[name].accuracy)})"
    return Verdict(N, use, why)


def _is_as_accurate(theirs: float | None, ours: float | None) -> bool:
    return theirs is not None and ours is not None and theirs >= ours


def _percent(accuracy: float | None) -> str:
    return "not known" if accuracy is None else f"{100 * accuracy:.1f}%"


def _check(
    model: Any,
    example_input: Any,
    exit_shares: Sequence[float],
    batches: Sequence[int],
    accuracy: float | None,
    accuracy_exits_off: float | None,
    rivals: Mapping[str, Rival],
    seconds: float,
) -> None:
    if not isinstance(model, ELF):
        raise TypeError(f"model: expected an ELF, got {checks.describe(model)}")
    checks.example_input(example_input)
    E = len(model.stages)
    if len(exit_shares) != E:
        raise ValueError(f"exit_shares: expected {E}, one per exit, got {len(exit_shares)}")
    for share in exit_shares:
        checks.at_least("exit_shares", share, 0.0, 1.0)
    if not math.isclose(sum(exit_shares), 1.0, abs_tol=1e-3):
        raise ValueError(f"exit_shares: expected a sum of 1, got {sum(exit_shares):g}")
    if not batches:
        raise ValueError("batches: expected at least one batch size, got none")
    for N in batches:
        checks.integer("batches", N, 1, 2**16)
    if len(set(batches)) < len(batches):
        raise ValueError(f"batches: expected each size once, got {list(batches)}")
    for name, known in (("accuracy", accuracy), ("accuracy_exits_off", accuracy_exits_off)):
        if known is not None:
            checks.at_least(name, known, 0.0, 1.0)
    for name, rival in rivals.items():
        if name in (EXITS, WHOLE):
            raise ValueError(f"rivals: expected other names than {EXITS} and {WHOLE}, got {name}")
        if rival.accuracy is not None:
            checks.at_least(f"rivals[{name!r}].accuracy", rival.accuracy, 0.0, 1.0)
    checks.at_least("seconds", seconds, 0.0, 86_400.0)
