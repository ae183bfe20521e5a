"""`Policy`: thresholds and temperatures, what they were chosen for, and what was measured; and its
JSON file.

Shapes: E exits, C classes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .. import __version__, checks, criteria
from ..atomic import write
from ..criteria import Score
from .reading import PolicyError, Reader

__all__ = ["FILE", "FORMAT", "Estimate", "Exit", "Group", "Measured", "Policy", "PolicyError",
           "Promise", "Tried", "nested"]  # fmt: skip

#: The name of a policy's file beside the weights.
FILE = "policy.json"
FORMAT = "elf_fast policy 1"
#: What a policy may be chosen for. "accuracy": the most accurate, whatever it costs.
AIMS = ("accuracy", "max_flops", "max_ms", "max_drop", "exit_shares")


class Estimate(NamedTuple):
    """A share in [0, 1] and its 95% interval (Clopper and Pearson, 1934)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Promise:
    """What the thresholds were chosen for."""

    aim: str  # one of AIMS
    #: A share of the FLOPs without exits, milliseconds per batch, or a drop in accuracy.
    limit: float | None = None
    #: The largest drop in accuracy of the classes with few training images.
    few_drop: float | None = None
    #: The probability that the drops hold on new data of the same kind; None: not tested.
    guarantee: float | None = None
    #: For milliseconds: images per batch, and the device.
    batch: int | None = None
    device: str | None = None

    def sentence(self) -> str:
        """What the thresholds are, for people."""
        limit = "" if self.limit is None else f"{self.limit:g}"
        if self.aim == "max_flops":
            return f"the most accurate that costs at most {limit} of the FLOPs without exits"
        if self.aim == "max_ms":
            images = f"{self.batch} image" + ("s" if self.batch != 1 else "")
            return f"the most accurate that takes {limit} ms per batch of {images} on {self.device}"
        if self.aim == "exit_shares":
            return "those at which the wanted shares of the samples leave"
        if self.aim != "max_drop":
            return "the most accurate, and the cheapest of equals"
        few = (
            ""
            if self.few_drop is None
            else f", and for few-shot classes by at most {self.few_drop:g}"
        )
        if self.guarantee is None:
            return f"the cheapest whose accuracy on these samples drops by at most {limit}{few}"
        return (
            f"the accuracy drops by at most {limit}{few}, with probability {self.guarantee:g}, on "
            "new data of the same kind"
        )


@dataclass(frozen=True)
class Exit:
    """What was measured at one exit."""

    share: Estimate  # of the samples that left here
    accuracy: Estimate | None  # of those; None: nobody left here
    #: Mean of the exit test's statistic over those. For the criterion confidence this is their
    #: accuracy as the network estimates it, without labels.
    statistic: float | None


@dataclass(frozen=True)
class Group:
    """What was measured on the samples of a group of classes."""

    samples: int
    accuracy: Estimate
    accuracy_exits_off: Estimate
    exit_shares: tuple[Estimate, ...]  # [E]


@dataclass(frozen=True)
class Measured:
    """What the policy gave on its calibration data; with a guarantee, on the testing half."""

    samples: int
    accuracy: Estimate
    accuracy_exits_off: Estimate
    exits: tuple[Exit, ...]  # [E]
    flops_share: float | None = None  # of the network without exits
    ms: float | None = None  # per batch, predicted from the times of the stages
    groups: dict[str, Group] = dataclasses.field(default_factory=dict)

    @property
    def drop(self) -> float:
        """Accuracy with all exits off less the policy's; negative for a gain."""
        return self.accuracy_exits_off.value - self.accuracy.value


@dataclass(frozen=True)
class Tried:
    """What a criterion gave, when several were compared."""

    criterion: str
    accuracy: float
    cost: float  # in units of `Promise.limit`, or a share of FLOPs


@dataclass(frozen=True)
class Policy:
    """Thresholds and temperatures for one network, which `ELF.apply_policy` sets.

    Raises:
        PolicyError: fields that do not fit each other, naming the field.
    """

    criterion: str | Score
    thresholds: tuple[float, ...] | tuple[tuple[float, ...], ...]  # [E-1] or [E-1, C]
    temperatures: tuple[float, ...]  # [E-1]
    promise: Promise
    measured: Measured
    data_digest: str  # of the calibration data
    weights_digest: str | None = None  # `digests.of_weights`; None: fits any network of E exits
    version: str = __version__
    tried: tuple[Tried, ...] = ()  # empty if there was no choice of criteria

    def __post_init__(self) -> None:
        _check(self)

    def save(self, path: str | Path) -> None:
        """Writes the policy as JSON to `path`, completely or not at all.

        Raises:
            PolicyError: the criterion is a callable, which a file cannot hold.
        """
        if not isinstance(self.criterion, str):
            raise PolicyError(
                f"criterion: expected one of {', '.join(criteria.TABLE)} in a file, which holds no "
                f"function, got {checks.describe(self.criterion)}"
            )
        held = {"format": FORMAT, **dataclasses.asdict(self)}
        held["thresholds"] = _without_infinity(self.thresholds)
        text = json.dumps(held, indent=1, allow_nan=False) + "\n"
        write(Path(path), text.encode())

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """The policy in a file that `save` wrote. Nothing in the file is executed.

        Raises:
            PolicyError: the file is missing, damaged or no policy; the message names file and
                field.
        """
        path = Path(path)
        try:
            held = json.loads(path.read_bytes().decode())
        except FileNotFoundError:
            raise PolicyError(f"{path}: expected the file of a policy, found none") from None
        except OSError as error:
            raise PolicyError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise PolicyError(f"{path}: expected a policy in JSON ({error})") from error
        try:
            return _parsed(held)
        except (PolicyError, TypeError) as error:
            raise PolicyError(f"{path}: {error}") from error
        except ValueError as error:
            raise PolicyError(f"{path}: {error}") from error

    @property
    def exits(self) -> int:
        """E."""
        return len(self.temperatures) + 1

    @property
    def is_off(self) -> bool:
        """Whether no sample leaves early."""
        rows = (t if isinstance(t, tuple) else (t,) for t in self.thresholds)
        off = criteria.find(self.criterion).off
        return all(t == off for row in rows for t in row)

    def shown_thresholds(self) -> str:
        return shown_thresholds(self.thresholds)


def shown_thresholds(thresholds: Any) -> str:
    """The threshold of each exit but the last, for people: "0.93 / off"; of thresholds per class
    the lowest and highest. thresholds: as `Policy` holds them."""
    return " / ".join(_shown(t) for t in thresholds) or "none"


def nested(thresholds: Tensor) -> Any:
    """Thresholds [E-1] or [E-1, C] as `Policy` holds them."""
    rows = thresholds.tolist()
    return tuple(tuple(row) if isinstance(row, list) else row for row in rows)


def _shown(threshold: float | tuple[float, ...]) -> str:
    if not isinstance(threshold, tuple):
        return f"{threshold:.3g}" if math.isfinite(threshold) else "off"
    low, high = (_shown(end) for end in (min(threshold), max(threshold)))
    return low if low == high else f"{low}..{high}"


def _without_infinity(values: Any) -> Any:
    """JSON has no infinity: null stands for an exit that is off."""
    if isinstance(values, tuple):
        return [_without_infinity(value) for value in values]
    return None if math.isinf(values) else values


def _check(policy: Policy) -> None:
    """Raises a PolicyError unless the fields fit each other."""
    try:
        criterion = criteria.find(policy.criterion)
        E = policy.exits
        if len(policy.thresholds) != E - 1:
            raise ValueError(
                f"thresholds: expected {E - 1}, one per temperature, got {len(policy.thresholds)}"
            )
        rows = [t if isinstance(t, tuple) else (t,) for t in policy.thresholds]
        if len({(type(t), len(row)) for t, row in zip(policy.thresholds, rows, strict=True)}) > 1:
            raise ValueError("thresholds: expected [E-1] or [E-1, C], got rows of several lengths")
        for row in rows:
            for t in row:
                checks.threshold_values("thresholds", t, criterion)
        for T in policy.temperatures:
            checks.positive("temperatures", T)
        if len(policy.measured.exits) != E:
            raise ValueError(
                f"measured.exits: expected {E}, one per exit, got {len(policy.measured.exits)}"
            )
        for name, group in policy.measured.groups.items():
            if len(group.exit_shares) != E:
                raise ValueError(
                    f"measured.groups.{name}.exit_shares: expected {E}, got "
                    f"{len(group.exit_shares)}"
                )
        if policy.promise.aim not in AIMS:
            raise ValueError(
                f"promise.aim: expected one of {', '.join(AIMS)}, got {policy.promise.aim!r}"
            )
    except (ValueError, TypeError) as error:
        raise PolicyError(str(error)) from error


def _parsed(held: Any) -> Policy:
    """The policy in what JSON held."""
    top = Reader("", held)
    if top.get("format") != FORMAT:
        raise PolicyError(f"format: expected {FORMAT!r}, got {checks.describe(top.get('format'))}")
    criterion = criteria.by_name(top.text("criterion"))
    promise, measured = top.inner("promise"), top.inner("measured")
    policy = Policy(
        criterion=criterion.name,
        thresholds=top.thresholds("thresholds", criterion.off),
        temperatures=top.numbers("temperatures"),
        promise=Promise(
            promise.text("aim"),
            promise.number("limit", none=True),
            promise.share("few_drop", none=True),
            promise.share("guarantee", none=True),
            promise.count("batch", none=True),
            promise.text("device", none=True),
        ),
        measured=Measured(
            samples=measured.count("samples"),
            accuracy=Estimate(*measured.estimate("accuracy")),
            accuracy_exits_off=Estimate(*measured.estimate("accuracy_exits_off")),
            exits=tuple(map(_exit, measured.inners("exits"))),
            flops_share=measured.number("flops_share", none=True),
            ms=measured.number("ms", none=True),
            groups={name: _group(group) for name, group in measured.named("groups").items()},
        ),
        data_digest=top.digest("data_digest"),
        weights_digest=top.digest("weights_digest", none=True),
        version=top.text("version"),
        tried=tuple(map(_tried, top.inners("tried"))),
    )
    return policy


def _tried(found: Reader) -> Tried:
    return Tried(found.text("criterion"), found.share("accuracy"), found.number("cost"))


def _exit(found: Reader) -> Exit:
    accuracy = found.estimate("accuracy", none=True)
    return Exit(
        Estimate(*found.estimate("share")),
        None if accuracy is None else Estimate(*accuracy),
        found.number("statistic", none=True, low=-math.inf),
    )


def _group(found: Reader) -> Group:
    return Group(
        found.count("samples"),
        Estimate(*found.estimate("accuracy")),
        Estimate(*found.estimate("accuracy_exits_off")),
        tuple(Estimate(*share) for share in found.estimates("exit_shares")),
    )
