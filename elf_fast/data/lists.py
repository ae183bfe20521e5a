"""Data sets given by lists of image files: ImageNet-LT, Places-LT, iNaturalist 2018, your own."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

from .images import ImageFiles
from .splits import DataError, Splits
from .transforms import Transforms, image_transforms

_SHOWN = 5  # examples of each kind of finding


class Facts(NamedTuple):
    """The published sizes of a data set, against which its lists are checked."""

    lists: Mapping[str, tuple[str, int]]  # part -> (usual name of its list, images in it)
    classes: int
    largest: int  # training images of the largest class
    smallest: int


#: ImageNet-LT and Places-LT: counted in the lists of Liu et al., arXiv 1904.05160; 20 validation
#: images per class, and 50 (ImageNet-LT) or 100 (Places-LT) test images. iNaturalist 2018:
#: github.com/visipedia/inat_comp; its test labels were not published, so results are reported on
#: validation (3 images per class).
PUBLISHED = {
    "ImageNet-LT": Facts(
        lists={
            "train": ("ImageNet_LT_train.txt", 115_846),
            "validation": ("ImageNet_LT_val.txt", 20_000),
            "test": ("ImageNet_LT_test.txt", 50_000),
        },
        classes=1000,
        largest=1280,
        smallest=5,
    ),
    "Places-LT": Facts(
        lists={
            "train": ("Places_LT_train.txt", 62_500),
            "validation": ("Places_LT_val.txt", 7_300),
            "test": ("Places_LT_test.txt", 36_500),
        },
        classes=365,
        largest=4980,
        smallest=5,
    ),
    "iNaturalist-2018": Facts(
        lists={
            "train": ("iNaturalist18_train.txt", 437_513),
            "validation": ("iNaturalist18_val.txt", 24_426),
        },
        classes=8142,
        largest=1000,
        smallest=2,
    ),
}


def published(
    name: str,
    root: str | Path,
    lists: str | Path | None = None,
    *,
    transforms: Transforms | None = None,
    exif_orientation: bool = True,
) -> Splits:
    """A data set of `PUBLISHED` from the lists of its authors, checked against its published sizes.

    Args:
        name: "ImageNet-LT", "Places-LT" or "iNaturalist-2018".
        root: the folder that the paths in the lists are relative to.
        lists: the folder that holds the lists under their usual names (see `PUBLISHED`); root if
            None.
        transforms: `image_transforms()` if None.
        exif_orientation: turn images as their EXIF orientation says.

    Raises:
        DataError: as `from_lists`, or the numbers of images or the class sizes differ.
        ValueError: `PUBLISHED` has no such name.
    """
    if name not in PUBLISHED:
        raise ValueError(f"name: expected one of {', '.join(PUBLISHED)}, got {name!r}")
    facts = PUBLISHED[name]
    folder = Path(root if lists is None else lists)
    files = {part: folder / file for part, (file, _) in facts.lists.items()}
    return _load(root, files, facts, transforms, exif_orientation)


def from_lists(
    root: str | Path,
    train: str | Path,
    validation: str | Path | None = None,
    test: str | Path | None = None,
    *,
    transforms: Transforms | None = None,
    exif_orientation: bool = True,
) -> Splits:
    """A data set from lists with a line `relative/path label` for every image, labels from 0.

    The largest label in `train` gives the number of classes. Each class is named after the folder
    below root of its first training image; if two classes share a folder name, or an image lies in
    root itself, all have numbers as names.

    Args:
        root: the folder that the paths in the lists are relative to.
        transforms: `image_transforms()` if None.
        exif_orientation: turn images as their EXIF orientation says.

    Raises:
        DataError: a list is missing or empty, a line is malformed, a label is out of range, a class
            has no training image, an image is missing, or an image of training is in another list.
            The message has a line per finding.
    """
    given = {"train": train, "validation": validation, "test": test}
    files = {part: Path(file) for part, file in given.items() if file is not None}
    return _load(root, files, None, transforms, exif_orientation)


class _List(NamedTuple):
    paths: list[str]  # [N], below root
    labels: list[int]  # [N]
    lines: list[int]  # [N] line numbers, from 1
    malformed: list[str]


def _load(
    root: str | Path,
    files: Mapping[str, Path],
    facts: Facts | None,
    transforms: Transforms | None,
    exif_orientation: bool,
) -> Splits:
    missing = [file for file in files.values() if not file.is_file()]
    if missing:
        raise DataError(
            "\n".join(f"{file}: expected a list of images, got no file" for file in missing)
        )
    lists = {part: _read(file, root) for part, file in files.items()}
    classes = facts.classes if facts else max([0, *lists["train"].labels]) + 1
    findings = [
        f"{files[part]}: {finding}"
        for part, listed in lists.items()
        for finding in _findings(part, listed, classes, facts)
    ]
    trained = {os.path.normpath(path) for path in lists["train"].paths}
    for part in () if facts else lists.keys() - {"train"}:  # published lists are as they are
        shared = [path for path in lists[part].paths if os.path.normpath(path) in trained]
        if shared:
            findings.append(
                f"{files[part]}: expected images that the train list does not have, got "
                f"{len(shared):,} that it has: {_first(shared)}"
            )
    if findings:
        raise DataError("\n".join(findings))
    transforms = transforms or image_transforms()
    datasets = {
        part: ImageFiles(
            listed.paths,
            torch.tensor(listed.labels, dtype=torch.int64),
            transforms.train if part == "train" else transforms.evaluate,
            root=str(root),
            exif_orientation=exif_orientation,
        )
        for part, listed in lists.items()
    }
    return Splits(
        train=datasets["train"],
        validation=datasets.get("validation"),
        test=datasets.get("test"),
        class_names=_class_names(lists["train"], classes, root),
    )


def _read(file: Path, root: str | Path) -> _List:
    listed = _List([], [], [], [])
    # File names may hold bytes that are not UTF-8; editors of Windows put a mark before the text.
    text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    for number, line in enumerate(text.split("\n"), start=1):
        fields = line.rsplit(maxsplit=1)
        if len(fields) == 2 and re.fullmatch(r"-?[0-9]{1,18}", fields[1]):
            listed.paths.append(os.path.join(root, fields[0].lstrip()))
            listed.labels.append(int(fields[1]))
            listed.lines.append(number)
        elif fields:
            listed.malformed.append(f"line {number} ({line.strip()[:80]!r})")
    return listed


def _findings(part: str, listed: _List, classes: int, facts: Facts | None) -> Iterator[str]:
    """What is wrong with the list of one part."""
    N = len(listed.paths)
    if listed.malformed:
        yield (
            f"expected lines 'relative/path label', got {len(listed.malformed):,} malformed: "
            f"{_first(listed.malformed)}"
        )
    outside = [
        f"line {line} ({label})"
        for line, label in zip(listed.lines, listed.labels, strict=True)
        if not 0 <= label < classes
    ]
    if outside:
        known = "0 on" if part == "train" and not facts else f"0 to {classes - 1}"
        yield f"expected labels from {known}, got {len(outside):,} others: {_first(outside)}"
    if not N and not listed.malformed:
        yield "expected images, got none"
    elif facts and facts.lists[part][1] != N:
        yield f"expected {facts.lists[part][1]:,} images, got {N:,}"
    if part == "train" and N and not outside:
        counts = Counter(listed.labels)
        without = classes - len(counts)
        if without:
            empty = islice((c for c in range(classes) if c not in counts), _SHOWN + 1)
            yield f"expected images of every class, {without:,} have none: {_first(list(empty))}"
        elif facts:
            largest, smallest = max(counts.values()), min(counts.values())
            if (largest, smallest) != (facts.largest, facts.smallest):
                yield (
                    f"expected {facts.largest} images of the largest class and {facts.smallest} of "
                    f"the smallest, got {largest} and {smallest}"
                )
    absent = [path for path in listed.paths if not os.path.isfile(path)]
    if absent:
        yield f"{len(absent):,} of {N:,} images are missing: {_first(absent)}"


def _first(items: Sequence[object]) -> str:
    return ", ".join(map(str, items[:_SHOWN])) + (", ..." if len(items) > _SHOWN else "")


def _class_names(train: _List, classes: int, root: str | Path) -> list[str]:
    """[C] the folder of each class's first image, or numbers if two classes share a name or a
    folder is root, whose name is no part of the list."""
    start = os.path.join(root, "")
    folders: dict[int, str] = {}
    for path, label in zip(train.paths, train.labels, strict=True):
        if label not in folders:
            folder = os.path.normpath(os.path.dirname(path.removeprefix(start)))
            folders[label] = os.path.basename(folder)
    names = [folders[c] for c in range(classes)]
    is_named = len(set(names)) == classes and not {".", ".."}.intersection(names)
    return names if is_named else [str(c) for c in range(classes)]
