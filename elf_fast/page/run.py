"""The page of an evaluation, alone or beside others, from what `runs.observation` saw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..criteria import find
from ..groups import FEW_BELOW, GROUPS, MANY_ABOVE, class_groups
from ..metrics import CALIBRATION_BINS
from . import estimates, sections
from .compare import comparison
from .evaluated import SHOWN, Evaluated
from .markup import Html, document, element, table
from .sections import Headline, interval, percent, points
from .tradeoff import against_flops, against_time, numbers


def html(runs: Sequence[Evaluated], command: str) -> str:
    """The page of the first run, with curves and figures of the others beside it.

    Args:
        command: what makes this page.

    Raises:
        ValueError: an evaluation has no samples that count.
    """
    for run in runs:
        run.check()
    run = runs[0]
    title = f"{run.name}: {run.part} set"
    images = f"{len(run.target):,} images of {len(run.class_names):,} classes"
    body: list[Any] = [
        element("h1", run.name),
        element("p", f"Evaluated on the {run.part} part, {images}.", class_="soft"),
        sections.headlines(_headlines(run)),
        element("div", against_flops(runs), against_time(runs) or "", class_="plots"),
        *([numbers(run)] if run.exits > 1 else []),
        element("p", " ".join(_sentences(run))),
    ]
    if len(runs) > 1:
        body += [element("h2", "The runs side by side"), comparison(runs)]
    body += [element("h2", "Many, medium and few"), _groups(run)]
    if run.exits > 1:
        bars, is_single = sections.bars(run.class_names, run.class_counts, run.counts())
        body += [
            element("h2", "Where each class leaves"),
            element("p", "From the class with most training images to the one with fewest."
                    + ("" if is_single else " Each row holds neighbours."), class_="soft"),
            sections.exits_by_class(bars, run.exits),
            element("h2", "Who leaves early and wrong"),
            *early_wrong(run),
        ]  # fmt: skip
    body += [
        element("h2", "The most frequent confusions"),
        confusions(run.observed.metrics["confusions"], run.class_names),
        element("h2", "How sure and how right each exit is"),
        *exits(run),
        element("footer", *_notes(run), element("pre", command)),
    ]
    return document(title, *body)


def _headlines(run: Evaluated) -> list[Headline]:
    low, high = (percent(value) for value in run.accuracy[1:])
    notes = [f"95% interval {low} to {high}"]
    if run.exits == 1:
        found = [Headline("accuracy", f"{percent(run.accuracy.value)}%", notes)]
        if run.speed is not None:
            value, low, high = (f"{number:.3g}" for number in run.speed.whole)
            where = f"per image, batches of {run.speed.batch} on {run.speed.where}"
            found.append(Headline("speed", f"{value} ms", [f"quartiles {low} to {high}", where]))
        return found
    notes.append(f"{points(run.gain)} points against the whole network")
    share = run.flops_share
    low, high = (percent(value) for value in share[1:])
    found = [
        Headline("accuracy", f"{percent(run.accuracy.value)}%", notes),
        Headline("compute", f"{percent(share.value)}%",
                 [f"95% interval {low} to {high}", "of the FLOPs of the whole network"]),
    ]  # fmt: skip
    if run.speed is not None:
        value, low, high = (f"{number:.2f}" for number in run.speed.ratio)
        where = f"as many images per second as the whole network, batches of {run.speed.batch} on "
        found.append(
            Headline("speed", f"{value} \N{MULTIPLICATION SIGN}",
                     [f"quartiles {low} to {high}", where + run.speed.where])
        )  # fmt: skip
    return found


def _sentences(run: Evaluated) -> list[str]:
    """At most three, in plain words."""
    if run.exits == 1:
        return ["This network has no exits, so every image costs the same."]
    share, gain = percent(run.flops_share.value, 0), run.gain
    if gain.low <= 0 <= gain.high:
        verdict = f"differs from it by {points(gain)} points of accuracy, which may be chance"
    else:
        more = "more" if gain.value > 0 else "less"
        verdict = f"is {more} accurate, by {points(gain)} points"
    found = [f"At {share}% of the FLOPs of the whole network, the network with exits {verdict}."]
    if run.speed is not None:
        ratio = run.speed.ratio
        found.append(
            "It is also faster here." if ratio.low > 1 else
            "It is slower here: the exits cost more time than they save."
            if ratio.high < 1 else "It is about as fast here."
        )  # fmt: skip
    by_exit = run.observed.metrics["exit_shares"]
    found.append(
        f"{percent(1 - by_exit[-1], 0)}% of the images leave early, and "
        f"{percent(run.observed.metrics['early_wrong'])}% of all leave early with a wrong answer."
    )
    return found


def _groups(run: Evaluated) -> Html:
    limits = {"many": f"over {MANY_ABOVE}", "medium": f"{FEW_BELOW} to {MANY_ABOVE}",
              "few": f"under {FEW_BELOW}"}  # fmt: skip
    has_exits = run.exits > 1
    headings = ["training images of a class", "classes", "images"]
    if has_exits:
        headings += ["whole network, %", "with exits, %", "difference, points",
                     "left at each exit, %"]  # fmt: skip
    else:
        headings.append("accuracy, %")
    rows = []
    groups = {"all": list(range(len(run.class_names))), **class_groups(run.class_counts)}
    gained = run.correct.double() - run.correct_at_end.double()
    for name, classes in groups.items():
        inside = torch.isin(run.target, torch.tensor(classes, dtype=torch.int64))
        weight = run.weight[inside]
        row = [f"{name} ({limits[name]})" if name in limits else name, f"{len(classes):,}",
               f"{int(inside.sum()):,}"]  # fmt: skip
        after = _with_interval(interval(estimates.share(run.correct[inside], weight)))
        if has_exits:
            before = interval(estimates.share(run.correct_at_end[inside], weight))
            gain = points(estimates.mean(gained[inside], weight))
            m = run.observed.metrics
            shares = m["exit_shares"] if name == "all" else m["exit_shares_by_group"][name]
            shown = "none" if shares is None else " / ".join(percent(s, 0) for s in shares)
            row += [_with_interval(before), after, _with_interval(gain), shown]
        else:
            row.append(after)
        rows.append(row)
    return table(headings, rows, "Accuracy with 95% intervals")


def _with_interval(text: str) -> Html:
    """Puts the interval below its value on small screens."""
    value, bracket, rest = text.partition(" [")
    tail = element("span", bracket + rest, class_="interval") if rest else ""
    return element("span", value, tail)


def early_wrong(run: Evaluated) -> list[Html]:
    """How many leave early and wrong, and the surest of them as pictures."""
    m, names = run.observed.metrics, run.class_names
    shown = run.observed.early_wrong[:SHOWN]
    rows = [
        [group, percent(m["early_wrong"] if group == "all" else m["early_wrong_by_group"][group])]
        for group in ("all", *GROUPS)
    ]
    found = [table(["classes", "left early and wrong, % of their images"], rows)]
    if not shown:
        return [*found, element("p", "No image left early with a wrong answer.")]
    count = f"The {len(shown)} surest" if len(shown) > 1 else "The only one"
    found.append(element("p", f"{count}, in the network's input size.", class_="soft"))
    thumbs = []
    for w in shown:
        end = "the last exit is right" if w.final_prediction == w.target else (
            f"the last exit says {names[w.final_prediction]}"
        )  # fmt: skip
        lines = [f"{names[w.target]}, taken for {names[w.prediction]}",
                 f"{percent(w.probability)}% sure at exit {w.exit_index + 1}; {end}"]  # fmt: skip
        if run.files is not None and w.sample < len(run.files):
            lines.append(Path(run.files[w.sample]).name)
        picture = sections.picture(w.image, run.mean, run.std)
        thumbs.append(sections.Thumbnail(picture, f"an image of class {names[w.target]}", lines))
    return [*found, sections.thumbnails(thumbs)]


def confusions(pairs: Sequence[dict[str, Any]], names: Sequence[str]) -> Html:
    if not pairs:
        return element("p", "No image was taken for another class.")
    rows = [
        [names[p["target"]], names[p["prediction"]], f"{p['samples']:,}", percent(p["share"])]
        for p in pairs
    ]
    return table(["class", "taken for", "images", "% of the class"], rows)


def exits(run: Evaluated) -> list[Html]:
    """Accuracy and calibration of every exit."""
    m, observed = run.observed.metrics, run.observed
    rows = []
    for e in range(run.exits):
        name = f"{e + 1}" if e + 1 < run.exits else f"{e + 1}, the last"
        rows.append([
            name,
            percent(run.flops.leaving_at(e) / run.flops.without_exits),
            percent(m["exit_shares"][e]) if m["exit_shares"] else "none",
            percent(m["exit_accuracy"][e]),
            percent(m["anytime_accuracy"][e]),
            percent(m["anytime_ece"][e]),
        ])  # fmt: skip
    headings = ["exit", "FLOPs, % of the whole network", "images that left here, %",
                "their accuracy, %", "accuracy if all left here, %",
                "calibration error, %"]  # fmt: skip
    found = [table(headings, rows)]
    probability = observed.probability
    if bool(probability.isnan().any()):
        return [*found, element("p", "Some probabilities are NaN, so calibration is not shown.")]
    diagrams = [
        sections.bins(p, right, CALIBRATION_BINS)
        for p, right in zip(probability, observed.table.correct, strict=True)
    ]
    return [*found, sections.reliability_by_exit(diagrams, m["anytime_ece"])]


def _notes(run: Evaluated) -> list[Html]:
    criterion = find(run.observed.table.criterion).name
    found = [
        "The whole network is the same network with its exits off. Intervals of accuracies are "
        "Clopper and Pearson's; those of FLOPs and of differences, which compare the two answers "
        "to each image, are 1.96 standard errors. They hold for other images of the same kind, not "
        "for another training.",
    ]
    if run.exits > 1 and run.part == "validation":
        found.append(
            "There is no test part. If these images also chose the thresholds, the accuracy on new "
            "ones is a little lower."
        )
    if run.exits > 1:
        found.append(
            f"Curves move all thresholds ({criterion}) together, on these images; the dot is the "
            "run's own choice."
        )
    if run.speed is not None:
        found.append(
            f"Milliseconds were measured here end to end, with plain PyTorch and the kernels of "
            f"the exits, on {run.speed.where}: {run.speed.images} images, {run.speed.batch} at a "
            "time, medians with quartiles over the repetitions. The curve joins "
            f"{len(run.timed)} settings of the thresholds."
        )
    if run.prior is not None:
        found.append(
            "Accuracies, shares and FLOPs are weighted by the prior of the classes that was asked "
            "for; intervals then are those of as many equal samples (Kish). Confusions, "
            "calibration and the rows of single classes are not weighted."
        )
    found.append(
        "Reliability: all images at every exit, also those that leave before it; the area of a dot "
        "is its share of the images."
    )
    versions = f"elf_fast {__version__}, torch {torch.__version__}."
    return [element("p", text) for text in (*found, versions)]
