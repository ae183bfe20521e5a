"""What was measured of a run, from the files beside its weights."""

from __future__ import annotations

import json
from pathlib import Path

from ..modules import ELF
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
    file = (path if path.is_dir() else path.parent) / METRICS
    if not file.is_file():
        return None
    try:
        results = json.loads(file.read_bytes())
        part = next((name for name in ("test", "validation") if name in results), None)
        if part is None:
            return None
        shares = results[part]["exit_shares"]
        if shares is None:
            return None
        fits = len(shares) == E and all(0 <= share <= 1 for share in shares)
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise CheckpointError(f"{file}: expected the metrics of a run ({error!r})") from error
    if not fits:
        raise CheckpointError(f"{file}: exit_shares: expected {E} shares, got {shares}")
    return [float(share) for share in shares], f"{part} ({METRICS})"
