"""Files and options named in README.md and docs/ exist, and the examples run. Other commands and
code on the pages: test_code_blocks.py."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import parsed
from torch import nn

import elf_fast
from elf_fast import ELF, ELFOutput, ExitHead, cli
from elf_fast.policy import ExitTable, Policy, Promise
from elf_fast.policy.measure import measured
from elf_fast.runs import networks

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
#: Options of other commands that docs/training.md names.
OTHERS = {"--nproc-per-node", "--per"}


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def named_files(text: str) -> set[str]:
    """Paths of this project between backticks."""
    return set(
        re.findall(r"`((?:tests|docs|elf_fast|benchmarks|csrc|kernels)/[\w./-]*\.\w+)`", text)
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_files_exist(page):
    links = re.findall(r"\]\(([^)#]+)", read(page))
    missing = [to for to in links if "://" not in to and not (page.parent / to).exists()]
    assert missing == []


def test_links_are_seen():
    assert "docs/training.md" in re.findall(r"\]\(([^)#]+)", read(ROOT / "README.md"))


@pytest.mark.parametrize("page", ["training", "data", "distributed", "serving"])
def test_files_named_on_a_page_exist(page):
    missing = [
        name for name in named_files(read(DOCS / f"{page}.md")) if not (ROOT / name).exists()
    ]
    assert missing == []


def test_the_guarantees_of_distributed_training_name_their_tests():
    page = read(DOCS / "distributed.md")
    assert "tests/training/test_resume.py" in named_files(page)
    table = page[page.index("| guarantee | test |") : page.index("The one difference")]
    named = re.findall(r"`([a-z_]{12,})`", table)
    written = set(re.findall(r"^def test_(\w+)", read(ROOT / "tests/test_distributed.py"), re.M))
    assert len(named) >= 12 and set(named) <= written


# docs/training.md


def test_every_flag_on_the_page_of_training_exists(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    named = set(re.findall(r"(?<!\w)--[a-z][a-z-]+", read(DOCS / "training.md")))
    assert len(named) > 20 and named - known == OTHERS


def test_the_documented_forms_of_thresholds_are_read():
    """The rows of the table: a flag, and the same as YAML and Python write it."""
    rows = re.findall(r"^\|[^|]+\| `(--thresholds [^`]+)` \| `([^`]+)` \|$",
                      read(DOCS / "training.md"), re.M)  # fmt: skip
    assert len(rows) == 4
    for flag, value in rows:
        given = parsed("--dataset", "digits", *flag.split())
        assert given == type(given)(dataset="digits", thresholds=eval(value))


def test_the_examples_of_thresholds_run():
    page = read(DOCS / "training.md")
    section = page[page.index("## Thresholds") : page.index("## What a run leaves")]
    by_class, moved, criterion = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    torch.manual_seed(0)
    stages = [nn.Linear(6, 6) for _ in range(3)]
    model = ELF(stages, [ExitHead(6, 4) for _ in stages]).eval()
    names = {"model": model, "class_counts": [400, 100, 20, 19]}
    exec(by_class, names)
    before = model.thresholds.clone()
    assert before.tolist() == [pytest.approx([0.95, 0.9, 0.9, 0.8])] * 2
    exec(moved, names)
    assert not torch.equal(model.thresholds, before)
    shift = model.thresholds.logit() - before.logit()
    torch.testing.assert_close(shift, shift[:1, :1].expand(2, 4))
    assert model.thresholds.logit().mean().sigmoid().item() == pytest.approx(0.9)
    exec(criterion, names)
    x = torch.randn(40, 6)
    sure = model.heads[0](stages[0](x)).logsumexp(dim=1)
    model.thresholds = sure.median().item()
    assert torch.equal(model(x).exit_index == 0, sure >= model.thresholds[0])
    made = networks.network(names["config"], [10] * 10)
    assert made.criterion is names["evidence"] and made.thresholds.tolist() == [5.0, 5.0]


# docs/inference.md and docs/serving.md


def test_the_example_of_inference_runs(one_thread, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", read(DOCS / "inference.md"), re.DOTALL)
    names: dict = {}
    exec(block, names)
    model, images = names["model"], names["images"]
    assert torch.equal(names["engine"](images).prediction, model(images).prediction)
    assert "stage 2, batches of 1 to 256: eager" in capsys.readouterr().out


def test_the_examples_of_serving_run(one_thread, capsys):
    blocks = re.findall(r"```python\n(.*?)```", read(DOCS / "serving.md"), re.DOTALL)
    assert len(blocks) == 4
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert len(names["predictions"]) == 16
    expected = names["model"](names["images"])
    assert torch.equal(names["predictions"], expected.prediction)
    assert "'answered': 1" in capsys.readouterr().out


def test_the_example_of_drift_runs(monkeypatch):
    """With a network whose exits and confidences are those of the policy."""
    page = read(DOCS / "drift.md")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    torch.manual_seed(0)
    table = ExitTable.from_logits(3 * torch.randn(2, 500, 4), torch.randint(0, 4, (500,)))
    policy = Policy("confidence", (0.9,), (1.0,), Promise("accuracy"),
                    measured(table, torch.tensor([0.9])), table.digest())  # fmt: skip
    exit_index = table.exit_index(torch.tensor([0.9]))
    confidence = table.statistic.gather(0, exit_index[None])[0]
    out = ELFOutput(table.logits[0], exit_index, confidence, exit_index, None)

    class Model:
        def __call__(self, images):
            return out

    Model.policy = policy
    monkeypatch.setattr(elf_fast, "load", lambda path: Model(), raising=False)
    names: dict = {"batches": range(4)}
    exec(block, names)
    shown = {name.partition("{")[0] for name in names["monitor"].metrics()}
    assert set(re.findall(r"`(elf_fast_drift_\w+)", page)) == shown and len(shown) == 9


def test_the_documented_metrics_exist(one_thread):
    client = pytest.importorskip("prometheus_client")
    registry = client.CollectorRegistry()
    names: dict = {}
    exec(re.findall(r"```python\n(.*?)```", read(DOCS / "serving.md"), re.DOTALL)[0], names)
    names["scheduler"].register(registry)
    shown = client.generate_latest(registry).decode()
    named = re.findall(r"`(elf_fast_\w+)`", read(DOCS / "serving.md"))
    assert len(named) == 7 and [name for name in named if name not in shown] == []


# docs/policy.md


def test_the_example_with_ones_own_logits_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", read(DOCS / "policy.md"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(next(block for block in blocks if "from_logits" in block), names)
    assert names["chosen"].measured.flops_share <= 0.6 + 1e-9
    assert "Estimate(" in capsys.readouterr().out


def test_the_tables_on_policies_are_those_of_the_results():
    from benchmarks.accuracy import policies

    results = json.loads(policies.RESULTS.read_text(encoding="utf-8"))
    page = read(DOCS / "policy.md")
    assert policies.page(page, results) == page
    assert len(policies.rows(results)) > 20 and "ours" in page
