"""The model card: README.md of a saved network, with the metadata that the Hub reads."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import checks
from ..base import ELFBase
from ..flops import Flops, count_flops
from ..policy import Policy
from ..policy import artefact as policies
from . import files
from .description import OWN, RUN, Facts, facts

NAME = "README.md"
#: Classes that the card lists; config.json has all.
_SHOWN = 50
#: Accuracies of fewer images are not written for the Hub.
_LEAST = 10
#: The last line of a card that this module wrote, with a digest of the lines above it.
_SIGNATURE = re.compile(
    rb"<!-- Written by elf_fast \(([0-9a-f]{16})\)\. It replaces this card unless you edit it\. "
    rb"-->\s*\Z"
)
_GROUPS = {
    "overall": "all classes",
    "many": "many (over 100 training images)",
    "medium": "medium (20 to 100)",
    "few": "few (under 20)",
}


def main_results(results: Any) -> tuple[str, Mapping[str, Any] | None]:
    """(part, metrics) of the results that the card shows: those on test, else on validation.

    Args:
        results: None, what `ELFMetrics` computes, or the contents of a run's metrics.json.

    Raises:
        TypeError, ValueError: it is none of these.
    """
    if results is None:
        return "", None
    if not isinstance(results, Mapping):
        raise TypeError(f"results: expected a dict of metrics, got {checks.describe(results)}")
    part = next((name for name in ("test", "validation") if name in results), "")
    if not part and "split" in results:  # of a run whose data have neither part
        return "", None
    metrics = results[part] if part else results
    if not isinstance(metrics, Mapping) or not isinstance(metrics.get("overall"), float | int):
        raise ValueError(
            "results: expected metrics with the entry overall, as metrics.ELFMetrics computes them "
            f"or metrics.json holds them, got {sorted(map(str, results))}"
        )
    return part or "test", metrics


def metrics_of(policy: Policy) -> dict[str, Any]:
    """What a policy gave on its calibration data, as metrics for the card."""
    found = policy.measured
    return {
        "samples": found.samples,
        "samples_by_group": {name: group.samples for name, group in found.groups.items()},
        "overall": found.accuracy.value,
        **{name: group.accuracy.value for name, group in found.groups.items()},
        "exit_shares": [each.share.value for each in found.exits],
        "flops_share": found.flops_share,
    }


def text(
    name: str,
    model: ELFBase,
    metadata: Mapping[str, Any],
    known: Facts,
    results: Any,
    policy: Policy | None,
    flops: Flops | None,
) -> str:
    """The card of a network, complete but for its signature.

    Args:
        name: of the network, such as that of its folder.
        metadata: its description.
        results: see `main_results`.
    """
    kind = _kind(metadata)
    part, metrics = main_results(results)
    body = [
        f"# {_plain(name)}",
        f"An image classifier with early exits: {kind}, {len(model.stages)} exits, "
        f"{len(known.class_names):,} classes. An image leaves at the first exit that is sure "
        "enough, so easy images cost less than hard ones.",
        "## Use it",
        _usage(metadata, known),
        "## Exits",
        _exits(model, flops, metrics, policy),
    ]
    if metrics is not None:
        body += [f"## Results on {part}", _results(metrics)]
        if part == "validation" and len(model.stages) > 1:
            body += [
                "The thresholds were chosen on these images, so the accuracy on new ones is a "
                "little lower."
            ]
    body += ["## Classes", _classes(known), "## Preprocessing", _preprocessing(known)]
    head = _front_matter(name, metadata, part, metrics)
    return f"---\n{head}---\n\n" + "\n\n".join(body) + "\n"


def write_for_run(
    folder: Path,
    model: ELFBase,
    metadata: Mapping[str, Any],
    results: Mapping[str, Any],
    flops: Flops,
) -> None:
    """Writes the card of a finished run into its folder: see `write`."""
    policy = folder / policies.FILE
    found = Policy.load(policy) if policy.exists() else None
    known = facts(folder, metadata)
    write(folder, text(folder.resolve().name, model, metadata, known, results, found, flops))


def write(folder: Path, content: str) -> bool:
    """Writes the card into the folder, unless a README.md is there that was not written here or was
    edited since. Returns whether it did."""
    path = folder / NAME
    if path.exists() and not _is_own(path.read_bytes()):
        return False
    encoded = content.encode(errors="backslashreplace") + b"\n"
    signature = (
        f"<!-- Written by elf_fast ({_digest(encoded)}). "
        "It replaces this card unless you edit it. -->\n"
    )
    files.write(path, encoded + signature.encode())
    return True


def _is_own(content: bytes) -> bool:
    found = _SIGNATURE.search(content)
    return found is not None and _digest(content[: found.start()]) == found[1].decode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _kind(metadata: Mapping[str, Any]) -> str:
    if metadata["network"] == RUN:
        return _plain(str(metadata["config"].get("model")))
    if "backbone" in metadata:
        return _plain(metadata["backbone"]["name"])
    return "a network of one's own" if metadata["network"] == OWN else "a small residual network"


def _front_matter(
    name: str, metadata: Mapping[str, Any], part: str, metrics: Mapping[str, Any] | None
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = None
    if metrics is not None:
        dataset = str(metadata.get("config", {}).get("dataset", "unknown"))
        common: dict[str, Any] = {
            "task_type": "image-classification",
            "dataset_type": dataset,
            "dataset_name": dataset,
            "dataset_split": part,
        }
        shown = [
            ("accuracy", "accuracy", metrics.get("overall")),
            *(("accuracy", f"accuracy, {g} classes", metrics.get(g)) for g in list(_GROUPS)[1:]),
            ("flops_share", "FLOPs as a share of those without exits", metrics.get("flops_share")),
        ]
        results = [
            EvalResult(**common, metric_type=kind, metric_name=label, metric_value=value)
            for kind, label, value in shown
            if value is not None and not _is_anecdote(metrics, label)
        ]
    data = ModelCardData(
        library_name="elf_fast",
        pipeline_tag="image-classification",
        tags=["image-classification", "early-exit", "long-tailed"],
        model_name=name if results else None,
        eval_results=results,
        ignore_metadata_errors=False,
    )
    return data.to_yaml() + "\n"


def _is_anecdote(metrics: Mapping[str, Any], label: str) -> bool:
    """Whether it is the accuracy of a group of fewer than `_LEAST` images."""
    counts = metrics.get("samples_by_group", {})
    return any(label == f"accuracy, {g} classes" and n < _LEAST for g, n in counts.items())


def _usage(metadata: Mapping[str, Any], known: Facts) -> str:
    own = ", model=model" if metadata["network"] == OWN else ""
    before = "build `model` by the code of its author, then\n\n" if own else ""
    image = "model.transform.read('image.jpg')" if known.transform else "image"
    return (
        f"{before}```python\nimport elf_fast\n\n"
        f"model = elf_fast.load('.'{own})  # or huggingface_hub.snapshot_download(...)\n"
        f"out = model({image}[None])\n"
        "print(model.class_names[out.prediction], out.confidence.item(), out.exit_index.item())\n"
        "```"
    )


def flops_of(model: ELFBase, metadata: Mapping[str, Any], known: Facts) -> Flops | None:
    """What the exits cost. None if the size of images is not known, or the network takes no single
    image of this size."""
    build = metadata.get("build") or {}
    shape = known.transform.shape if known.transform else build.get("input_shape")
    if shape is None:
        return None
    floats = [p.dtype for p in model.parameters() if p.is_floating_point()]
    image = torch.zeros(1, *shape, dtype=(floats or [torch.float32])[0])
    try:
        return count_flops(model, image.to(model.thresholds.device))
    except (RuntimeError, ValueError):
        return None


def _exits(
    model: ELFBase,
    flops: Flops | None,
    metrics: Mapping[str, Any] | None,
    policy: Policy | None,
) -> str:
    """A row for every exit: its cost, its threshold, and how many images leave there."""
    thresholds: Any = model.thresholds.tolist() if policy is None else policy.thresholds
    shares = None if metrics is None else metrics.get("exit_shares")
    rows = []
    for e in range(len(model.stages)):
        cost = "" if flops is None else f"{flops.leaving_at(e) / flops.without_exits:.1%}"
        threshold = _threshold(thresholds[e]) if e < len(thresholds) else "takes the rest"
        left = f"{shares[e]:.1%}" if shares else ""
        rows.append((str(e + 1), cost, threshold, left))
    criterion = model.criterion if policy is None else policy.criterion
    rule = f"the {criterion}" if isinstance(criterion, str) else "a function of the author's"
    source = "" if policy is None else ", from `policy.json`"
    heading = ("exit", "FLOPs, of the whole network's", "threshold", "images that left here")
    return f"The exit test reads {rule}{source}.\n\n{_table(heading, rows)}"


def _threshold(value: Any) -> str:
    if isinstance(value, Sequence):
        return f"{min(value):.3g} to {max(value):.3g}, by class"
    return "off" if abs(value) == float("inf") else f"{value:.3g}"


def _results(metrics: Mapping[str, Any]) -> str:
    counts = {"overall": metrics.get("samples"), **metrics.get("samples_by_group", {})}
    rows = [
        (label, f"{metrics[group]:.1%}", "" if (n := counts.get(group)) is None else f"{n:,}")
        for group, label in _GROUPS.items()
        if metrics.get(group) is not None
    ]
    table = _table(("classes", "accuracy", "images"), rows)
    share = metrics.get("flops_share")
    if share is None:
        return table
    return f"{table}\n\nAn image costs {share:.1%} of the FLOPs of the network without exits."


def _classes(known: Facts) -> str:
    counts = known.class_counts or ("",) * len(known.class_names)
    rows = [
        (str(c), _plain(name), f"{n:,}" if n != "" else "")
        for c, (name, n) in enumerate(zip(known.class_names, counts, strict=True))
    ]
    heading = ("index", "class", "training images")
    kept = [row[:3] if known.class_counts else row[:2] for row in rows[:_SHOWN]]
    more = len(rows) - _SHOWN
    rest = f"\n\n... and {more:,} more in `config.json`." if more > 0 else ""
    return _table(heading[: len(kept[0])], kept) + rest


def _preprocessing(known: Facts) -> str:
    t = known.transform
    if t is None:
        return "Not recorded."
    how = {
        "crop": f"The shorter side is scaled to {t.resize or round(t.size * 8 / 7)} pixels "
        f"({t.interpolation}) and the centre cropped to {t.size}x{t.size}.",
        "squash": f"Both sides are scaled to {t.size} pixels ({t.interpolation}).",
        "exact": f"Images must have {t.size}x{t.size} pixels.",
    }
    turned = " Photos are turned as their EXIF orientation says." if t.exif_orientation else ""
    return f"{how[t.fit]}{turned} Mean {list(t.mean)}, standard deviation {list(t.std)}."


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(value: str) -> str:
    """A text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(value.split()))
