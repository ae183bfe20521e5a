"""Fills page.md with the results and writes it as docs/accuracy.md.

python -m benchmarks.accuracy.page [--results FILE] [--cifar10-results FILE] [--output FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from . import cifar, results, tables
from .comparisons import Records, again, in_table
from .runs import table
from .summary import sentences, summarise

TEMPLATE = Path(__file__).with_name("page.md")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "accuracy.md"


def page(records: Records, cifar10: Records) -> str:
    """The page, in Markdown, from the runs on digits and on CIFAR-10."""
    return TEMPLATE.read_text(encoding="utf-8").format(
        in_short="\n".join(sentences(summarise(records))),
        best=tables.against_plain(in_table(records, point="best")),
        safe=tables.against_plain(in_table(records, point="safe")),
        dropping=tables.dropping(records),
        tried=tables.all_tried(records),
        again=tables.against_plain(again(records, point="best")),
        all_results=tables.all_results(records),
        cifar10=tables.cifar10(cifar10),
        cifar10_done=f"{len(cifar10)} of {len(cifar.table())}",
        origin=_origin(records),
    )


def _origin(records: Records) -> str:
    seconds = [record["seconds"] for record in records.values()]
    known = {
        key: ", ".join(sorted({record["environment"][key] for record in records.values()}))
        for key in ("torch", "cpu", "threads")
    }
    return (
        f"{len(records)} of the {len(table())} runs of the table are there. A run took "
        f"{median(seconds):.0f} s (median, beside other work) with {known['threads']} thread on "
        f"{known['cpu']}; torch {known['torch']}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.page", description=__doc__)
    parser.add_argument("--results", type=Path, default=results.PATH)
    parser.add_argument("--cifar10-results", type=Path, default=cifar.PATH)
    parser.add_argument("--output", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    try:
        records = results.load(options.results)
        cifar10 = results.load(options.cifar10_results)
    except ValueError as error:
        parser.error(str(error))
    if not records:
        parser.error(f"--results: expected finished runs, found none in {options.results}")
    options.output.write_text(page(records, cifar10), encoding="utf-8")
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
