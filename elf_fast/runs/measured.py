"""What was measured of a run, from the files beside its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .. import checks
from ..modules import ELF
from . import contents, opening
from .files import CheckpointError

METRICS = "metrics.json"


def exit_shares(path: Path, model: ELF) -> tuple[list[float], str] | None:
    """([E] shares of the images that left at each exit, what they were measured on), of a loaded
    network: from its policy, else from the run's metrics on test or validation. None: unknown.

    Raises:
        CheckpointError: metrics.json is damaged or of another network.
    """
    E = len(model.stages)
    if model.policy is not None:
        return [each.share.value for each in model.policy.measured.exits], "calibration data"
    for part in ("test", "validation"):
        shares = _entry(path, part, "exit_shares")
        if shares is None:
            continue
        is_list = isinstance(shares, list) and len(shares) == E
        if not is_list or not all(_is_share(share) for share in shares):
            raise CheckpointError(
                f"{_file(path)}: exit_shares: expected {E} shares, got {checks.describe(shares)}"
            )
        return [float(share) for share in shares], f"{part} ({METRICS})"
    return None


def accuracy(path: Path, model: ELF) -> float | None:
    """Accuracy in [0, 1] of a loaded network without its exits, on the run's validation part; None:
    unknown.

    Raises:
        CheckpointError: metrics.json is damaged.
    """
    if model.policy is not None:
        return model.policy.measured.accuracy_exits_off.value
    found = _entry(path, "validation", "overall") if len(model.stages) == 1 else None
    if found is not None and not _is_share(found):
        raise CheckpointError(f"{_file(path)}: overall: expected a number in [0, 1], got {found!r}")
    return found


def validation_digest(path: Path) -> str | None:
    """The digest of a run's validation part, as its policy holds it; None if there is none."""
    data = opening.read(path)[1].get("data")
    part = data.get("validation") if isinstance(data, dict) else None
    return None if part is None else contents.fingerprint(part)


def _entry(path: Path, part: str, name: str) -> Any:
    """An entry of a part of metrics.json; None if the file, the part or the entry is missing."""
    file = _file(path)
    if not file.is_file():
        return None
    try:
        results = json.loads(file.read_bytes())
        return results.get(part, {}).get(name)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: expected the metrics of a run ({error!r})") from error


def _file(path: Path) -> Path:
    return (path if path.is_dir() else path.parent) / METRICS


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
