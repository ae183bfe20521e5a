"""Ways to choose thresholds within a budget of FLOPs, on the same networks and data.

    python -m benchmarks.accuracy.policies --output FILE [--seeds N] [--work FOLDER]
    python -m benchmarks.accuracy.policies --show FILE

Small networks on long-tailed digits; thresholds are chosen on validation (200 images) and tested
once (500 images). Costs are shares of the network with all exits off, heads included. The rivals:

- one number for all exits, the most accurate within the budget;
- the geometric family of MSDNet's budgeted batch classification, likewise: `policy.shares`;
- earlyon's `calibrate_thresholds_for_budget` and `calibrate_thresholds`, as they are and with
  temperatures fitted. They read the same logits and costs. Where earlyon cannot keep the budget it
  takes what its grid has; so in these lines the budget of ours is what earlyon's thresholds cost on
  validation.

--work keeps the tables of trained networks, about 10 seconds each, and reads those that are there.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from elf_fast.policy import ExitTable, choose
from elf_fast.policy.one_number import candidates_of
from elf_fast.policy.search import Goal, Problem
from elf_fast.policy.shares import geometric

from ..environment import environment
from .networks import NETWORKS, Network, Tables, tables

RESULTS = Path(__file__).resolve().parents[1] / "results" / "policies-digits.json"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "policy.md"
BUDGETS = (0.5, 0.6, 0.7, 0.8)
DROPS = (0.01, 0.05)
EPOCHS = 30
OURS = "ours"

Chosen = tuple[ExitTable, ExitTable, Tensor]  # validation, test and thresholds [E-1]


class _Exits(nn.Module):
    """Stands for the stages of a network: passes on the number of the sample."""

    def __init__(self, stages: int) -> None:
        super().__init__()
        for e in range(stages):
            self.add_module(f"stage{e}", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.children():
            x = stage(x)
        return x


class _Replay(nn.Module):
    """A head that looks up the logits [N, C] of the samples x [n, 1]."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[x[:, 0].long()]


def earlyon(found: Tables, costs: list[float], *, fitted: bool, **limit: float) -> Tensor:
    """The thresholds [E-1] of earlyon and, as its wrapper has them, its temperatures: both are
    folded into one [2, E-1]."""
    from earlyon import EarlyExitConfig, EarlyExitWrapper, ExitPoint
    from earlyon.core import thresholds as rival

    logits = found.validation.logits
    assert logits is not None
    E, N, C = logits.shape
    names = [f"exit{e}" for e in range(E - 1)]
    config = EarlyExitConfig(
        backbone="stages",
        num_classes=C,
        exit_points=[ExitPoint(name, f"stage{e}", 1) for e, name in enumerate(names)],
        confidence_thresholds=[0.9] * (E - 1),
    )
    heads = {name: _Replay(logits[e]) for e, name in enumerate(names)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapper = EarlyExitWrapper(
            _Exits(E), heads, _Replay(logits[-1]), config, input_shape=(1, 1)
        )
        fractions = {f"stage{e}": cost for e, cost in enumerate(costs[:-1])}
        wrapper._flops_estimate = SimpleNamespace(fractions=fractions)
        loader = [(torch.arange(N)[:, None].float(), found.validation.target)]
        if "target_computation" in limit:
            done = rival.calibrate_thresholds_for_budget(
                wrapper, loader, fit_temperature=fitted, **limit
            )
        else:
            done = rival.calibrate_thresholds(wrapper, loader, fit_temperature=fitted, **limit)
    on = zip(done.thresholds, done.enabled_exits, strict=True)
    thresholds = [t if enabled else float("inf") for t, enabled in on]
    temperatures = [config.temperatures[name] if fitted else 1.0 for name in names]
    return torch.tensor([thresholds, temperatures])


def _ours(found: Tables, costs: list[float], budget: float) -> Chosen:
    policy = choose(found.validation, costs, max_flops=budget)
    parts = (t.changed(temperatures=policy.temperatures) for t in (found.validation, found.test))
    return *parts, torch.tensor(policy.thresholds)


def _earlyon(found: Tables, costs: list[float], fitted: bool, **limit: float) -> Chosen:
    thresholds, temperatures = earlyon(found, costs, fitted=fitted, **limit)
    parts = (t.changed(temperatures=temperatures) for t in (found.validation, found.test))
    return *parts, thresholds


def _best(found: Tables, costs: list[float], budget: float, family: list[Tensor]) -> Chosen:
    problem, goal = Problem(found.validation, costs), Goal(most=budget)
    best = max(family, key=lambda t: goal.rank(problem.value(problem.of_tensor(t))))
    return found.validation, found.test, best


def measured(chosen: Chosen, costs: list[float]) -> dict[str, Any]:
    """Accuracy and cost on validation and test."""
    *parts, thresholds = chosen
    entry: dict[str, Any] = {"thresholds": [None if t.isinf() else float(t) for t in thresholds]}
    for name, table in zip(("validation", "test"), parts, strict=True):
        assert isinstance(table, ExitTable)
        index = table.exit_index(thresholds)
        right = table.correct.gather(0, index[None])[0]
        entry[name] = {
            "accuracy": float(right.double().mean()),
            "cost": float(torch.tensor(costs, dtype=torch.float64)[index].mean()),
        }
    return entry


def compared(found: Tables) -> Iterator[dict[str, Any]]:
    """A record for every limit and way."""
    costs = [cost / found.costs[-1] for cost in found.costs]
    for budget in BUDGETS:
        if budget < costs[0]:
            continue
        ways = {
            OURS: _ours(found, costs, budget),
            "one number": _best(found, costs, budget, candidates_of(found.validation)),
            "geometric": _best(found, costs, budget, geometric(found.validation)),
        }
        for way, chosen in ways.items():
            yield {"limit": f"budget {budget:g}", "way": way, **measured(chosen, costs)}
    for limit, name in (
        *(({"target_computation": budget}, f"budget {budget:g}") for budget in BUDGETS),
        *(({"target_accuracy_drop": drop}, f"drop {drop:g}") for drop in DROPS),
    ):
        for fitted, suffix in ((False, ""), (True, ", temperatures")):
            theirs = measured(_earlyon(found, costs, fitted, **limit), costs)
            own = max(theirs["validation"]["cost"], costs[0])
            ours = measured(_ours(found, costs, own), costs)
            where = f"earlyon{suffix}, {name}"
            yield {"limit": where, "way": "earlyon", **theirs}
            yield {"limit": where, "way": OURS, **ours}


def rows(results: dict[str, Any]) -> list[str]:
    """The lines of the table on one number and the geometric family."""
    names = (OURS, "one number", "geometric")
    lines = _heading("network, loss, imbalance", "budget", *names)
    for network in _networks(results):
        for budget in BUDGETS:
            of = {way: _test(results, network, f"budget {budget:g}", way) for way in names}
            if of[OURS]:
                lines.append(_line(network, f"{budget:g}", of))
    return lines


def earlyon_rows(results: dict[str, Any]) -> list[str]:
    """The lines of the table on earlyon. Our budget is what earlyon's thresholds cost."""
    names = (OURS, "earlyon")
    lines = _heading("network, loss, imbalance", "earlyon was asked for", *names)
    limits = dict.fromkeys(r["limit"] for r in results["records"] if "earlyon" in r["limit"])
    for network in _networks(results):
        for limit in limits:
            of = {way: _test(results, network, limit, way) for way in names}
            lines.append(_line(network, limit.removeprefix("earlyon, "), of))
    return lines


def page(text: str, results: dict[str, Any]) -> str:
    """docs/policy.md with the tables of the results in place of those that it holds."""
    for name, lines in (("budget", rows(results)), ("earlyon", earlyon_rows(results))):
        before, _, rest = text.partition(f"<!-- {name} -->\n")
        text = f"{before}<!-- {name} -->\n" + "\n".join(lines) + "\n<!-- end -->"
        text += rest.partition("<!-- end -->")[2]
    return text


def _networks(results: dict[str, Any]) -> list[str]:
    return [*dict.fromkeys(r["network"] for r in results["records"])]


def _test(results: dict[str, Any], network: str, limit: str, way: str) -> list[dict[str, float]]:
    """The test entries of the seeds, in their order."""
    wanted = (network, limit, way)
    return [r["test"] for r in results["records"] if (r["network"], r["limit"], r["way"]) == wanted]


def _heading(*names: str) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]


def _line(network: str, limit: str, of: dict[str, list[dict[str, float]]]) -> str:
    cells = []
    for way, tests in of.items():
        cell = f"{100 * fmean(t['accuracy'] for t in tests):.1f} at {_cost(tests):.2f}"
        if way != OURS:
            ahead = [100 * (a["accuracy"] - b["accuracy"])
                     for a, b in zip(of[OURS], tests, strict=True)]  # fmt: skip
            spread = stdev(ahead) if len(ahead) > 1 else 0.0
            cell += f" ({fmean(ahead):+.1f} ± {spread:.1f})"
        cells.append(cell)
    return "| " + " | ".join((network, limit, *cells)) + " |"


def _cost(tests: list[dict[str, float]]) -> float:
    return fmean(t["cost"] for t in tests)


def as_text(results: dict[str, Any]) -> str:
    """The results as JSON, a line for every record."""
    records = ",\n".join(map(json.dumps, results["records"]))
    head = json.dumps({name: value for name, value in results.items() if name != "records"})
    return f'{head[:-1]}, "records": [\n{records}\n]}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy.policies", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--seeds", type=int, default=4, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keeps the networks' tables")
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--output", type=Path, metavar="FILE")
    chosen.add_argument(
        "--show",
        type=Path,
        metavar="FILE",
        help="prints the tables of a file and writes them into docs/policy.md",
    )
    options = parser.parse_args()
    if options.show:
        results = json.loads(options.show.read_text(encoding="utf-8"))
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
        print("\n".join([*rows(results), "", *earlyon_rows(results)]))
        return
    torch.set_num_threads(1)
    records = [
        {"network": str(network), "seed": seed, **record}
        for seed in range(options.seeds)
        for network in NETWORKS
        for record in compared(_tables(network, seed, options.work))
    ]
    results = {"epochs": EPOCHS, "seeds": options.seeds, "environment": environment(),
               "records": records}  # fmt: skip
    options.output.write_text(as_text(results), encoding="utf-8")
    print("\n".join([*rows(results), "", *earlyon_rows(results)]))


def _tables(network: Network, seed: int, work: Path | None) -> Tables:
    found = tables(network, seed, EPOCHS, work)
    print(network, seed, flush=True)
    return found


if __name__ == "__main__":
    main()
