"""Whether a window of unlabelled traffic differs from a policy's calibration data, and by how much.

Shapes: E exits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from .. import criteria
from .artefact import Estimate, Policy

__all__ = ["chi_square_quantile", "compare", "fall_limit", "psi", "psi_limit"]

_Z = 1.959964  # standard deviations to the ends of a 95% interval


def psi(counts: Any, expected: Any) -> float:
    """The population stability index of two histograms [E]: sum_e (q_e - p_e) log(q_e / p_e), with
    q the shares of `counts` and p those of `expected` (Siddiqi, "Credit Risk Scorecards", 2006,
    chapter 9). Every count gets one sample more, so that no share is 0."""
    q, p = (np.asarray(k, dtype=float) + 1 for k in (counts, expected))
    q, p = q / q.sum(), p / p.sum()
    return float(((q - p) * np.log(q / p)).sum())


def psi_limit(n: int, N: int, exits: int, alpha: float) -> float:
    """What the index of n samples and N samples from one distribution exceeds with probability
    alpha: (1/n + 1/N) times the quantile of chi-square with E degrees of freedom.

    Its limit for large samples has E - 1 (Yurdakul and Naranjo, "Statistical properties of the
    population stability index", Journal of Risk Model Validation, 2020). One more covers exits that
    hardly any sample takes (docs/drift.md).
    """
    return (1 / n + 1 / N) * chi_square_quantile(exits, alpha)


def chi_square_quantile(degrees: int, alpha: float) -> float:
    """What chi-square with so many degrees of freedom exceeds with probability alpha."""
    low, high = 0.0, degrees + 4 * math.sqrt(degrees) + 4 * math.log(1 / alpha)
    half = torch.tensor(degrees / 2, dtype=torch.float64, device="cpu")
    for _ in range(60):
        middle = (low + high) / 2
        at = torch.tensor(middle / 2, dtype=torch.float64, device="cpu")
        exceeded = float(torch.special.gammaincc(half, at))
        low, high = (middle, high) if exceeded > alpha else (low, middle)
    return high


def fall_limit(variance: float, n: int, N: int, span: float, alpha: float) -> float:
    """By how much the mean of n samples lies below that of N samples from the same distribution
    with probability at most alpha: Bernstein's inequality (Boucheron et al., "Concentration
    Inequalities", 2013, corollary 2.11) for values with this variance in a range of width span."""
    log = math.log(1 / alpha)
    largest = log * span * max(1 / n, 1 / N) / 3
    return largest + math.sqrt(largest**2 + 2 * log * variance * (1 / n + 1 / N))


def compare(policy: Policy, sums: np.ndarray, alpha: float, *, full: bool) -> dict[str, Any]:
    """See `Monitor.report`.

    Args:
        sums: [4, E] of the window, by exit: samples, samples with a finite statistic, the sum of
            their statistics and the sum of the squares. At least one sample.
        alpha: probability of a false alarm.
        full: whether the window has its size; only then there may be an alarm.
    """
    counts, finite, total, squares = sums
    measured = policy.measured
    n, N = int(counts.sum()), measured.samples
    expected = [round(x.share.value * N) for x in measured.exits]
    found: dict[str, Any] = {
        "samples": n,
        "exits": [
            {
                "share": float(counts[e] / n),
                "calibration_share": x.share.value,
                "statistic": float(total[e] / finite[e]) if finite[e] else None,
                "calibration_statistic": x.statistic,
            }
            for e, x in enumerate(measured.exits)
        ],
        "psi": psi(counts, expected),
        "psi_limit": psi_limit(n, N, len(counts), alpha / 2),
        **_sureness(policy, finite, total, squares, alpha / 2),
        "estimated_accuracy": _accuracy(policy, counts, finite, total, squares),
        "calibration_accuracy": measured.accuracy.value,
        "not_finite": int(n - finite.sum()),
    }
    return {**found, "alarm": _alarm(policy, found) if full else None}


def _sureness(policy: Policy, finite: Any, total: Any, squares: Any, alpha: float) -> dict:
    """The mean statistic, calibration's, and the value that it must pass for an alarm. None without
    a finite statistic, and as the limit of a criterion without bounds."""
    rule, measured, n = criteria.find(policy.criterion), policy.measured, finite.sum()
    known = [(x.share.value, x.statistic) for x in measured.exits if x.statistic is not None]
    mean = float(total.sum() / n) if n else None
    usual = sum(s * m for s, m in known) / sum(s for s, _ in known) if known else None
    limit = None
    if mean is not None and usual is not None and rule.is_bounded:
        variance = max(0.0, float(squares.sum() / n) - mean**2)
        fall = fall_limit(variance, int(n), measured.samples, rule.high - rule.low, alpha)
        limit = usual - fall if rule.larger_is_surer else usual + fall
    return {"statistic": mean, "calibration_statistic": usual, "statistic_limit": limit}


def _accuracy(
    policy: Policy, counts: Any, finite: Any, total: Any, squares: Any
) -> dict[str, float]:
    """The accuracy that the window would have if every exit's gap between accuracy and mean
    confidence were that of calibration: a difference of confidences (Guillory et al., arXiv
    2107.03315) per exit. For other criteria: if every exit's accuracy were.

    The standard error has two parts: the window's samples, and the accuracy of every exit in
    calibration, by its interval.
    """
    measured = policy.measured
    reads = policy.criterion == "confidence" and finite.sum() > 0
    n = finite if reads else counts
    whole = measured.accuracy
    means = [(x.share.value, x.statistic) for x in measured.exits if x.statistic is not None]
    gap = whole.value - sum(s * m for s, m in means) / max(sum(s for s, _ in means), 1e-12)
    added, errors = np.empty(len(n)), np.empty(len(n))
    for e, x in enumerate(measured.exits):
        known = x.accuracy is not None and (x.statistic is not None or not reads)
        accuracy = x.accuracy if known and x.accuracy is not None else whole
        if not reads:
            added[e] = accuracy.value
        else:
            added[e] = accuracy.value - (x.statistic or 0.0) if known else gap
        errors[e] = (accuracy.high - accuracy.low) / (2 * _Z)
    read, square = (total, squares) if reads else (np.zeros_like(n), np.zeros_like(n))
    N = n.sum()
    value = float((read + n * added).sum() / N)
    second = float((square + 2 * added * read + n * added**2).sum() / N)
    error = math.sqrt(max(0.0, second - value**2) / N + float(((n / N * errors) ** 2).sum()))
    bounds = (value, value - _Z * error, value + _Z * error)
    return Estimate(*(min(max(bound, 0.0), 1.0) for bound in bounds))._asdict()


def _alarm(policy: Policy, found: dict[str, Any]) -> str | None:
    """What is wrong, in words; None if nothing is."""
    reasons = []
    n, name = f"{found['samples']:,} samples", policy.criterion
    name = name if isinstance(name, str) else "score"
    if found["psi"] > found["psi_limit"]:
        moved = [x["share"] - x["calibration_share"] for x in found["exits"]]
        e = int(np.abs(moved).argmax())
        at = found["exits"][e]
        reasons.append(
            f"the exits taken differ from calibration: PSI {found['psi']:.3f} over {n}, limit "
            f"{found['psi_limit']:.3f}; {at['share']:.1%} left at exit {e + 1} instead of "
            f"{at['calibration_share']:.1%}"
        )
    limit, mean = found["statistic_limit"], found["statistic"]
    surer = 1 if criteria.find(policy.criterion).larger_is_surer else -1
    if limit is not None and surer * mean < surer * limit:
        accuracy = found["estimated_accuracy"]
        reasons.append(
            f"the network is less sure than in calibration: mean {name} {mean:.3f} over {n} "
            f"instead of {found['calibration_statistic']:.3f}, limit {limit:.3f}; estimated "
            f"accuracy {accuracy['value']:.1%} instead of {found['calibration_accuracy']:.1%}"
        )
    if found["not_finite"]:
        reasons.append(f"{found['not_finite']:,} of {n} have a {name} of NaN or infinity")
    return "; ".join(reasons) or None
