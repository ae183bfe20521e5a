"""Finds the parts, classes and image files of a folder, and tells what it left out."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from .splits import DataError

#: Extensions of the files that are read as images, in lower case.
EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".apng", ".gif", ".bmp", ".webp", ".avif",
    ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga",
)  # fmt: skip
#: What the folder of a part may be called, in lower case.
PART_NAMES = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
_PART_OF = {name: part for part, names in PART_NAMES.items() for name in names}
_KNOWN = "parts are named " + "; ".join(", ".join(n) for n in PART_NAMES.values())
_CURE = "If all of them are classes, put them into one folder named train"
_SHOWN = 5
#: What every run writes into its folder.
_RUN_NAMES = ("checkpoints", "config.yaml")
_HIDDEN, _RUN = "hidden", "folder of a run"
#: Folders that macOS adds to zips, and those that Synology adds for thumbnails.
_ADDED = ("__MACOSX", "@eaDir")


class LeftOut:
    """Counts what was not read below a folder, by reason, with an example of each."""

    def __init__(self, root: Path) -> None:
        self._start = os.path.join(root, "")
        self._found: dict[str, tuple[int, str]] = {}

    def add(self, reason: str, example: str, count: int = 1) -> None:
        before, first = self._found.get(reason, (0, example.removeprefix(self._start)))
        self._found[reason] = (before + count, first)

    def add_all(self, other: LeftOut) -> None:
        for reason, (count, example) in other._found.items():
            self.add(reason, example, count)

    @property
    def not_hidden(self) -> set[str]:
        """The reasons for what is not hidden."""
        return self._found.keys() - {_HIDDEN}

    def __str__(self) -> str:
        """Such as "2 x named .txt (cat/notes.txt), 1 x hidden (cat/.DS_Store)"."""
        ordered = sorted(self._found.items(), key=lambda item: (-item[1][0], item[0]))
        shown = [f"{n:,} x {reason} ({example})" for reason, (n, example) in ordered[:_SHOWN]]
        return ", ".join(shown) + (", ..." if len(ordered) > _SHOWN else "")


class Part(NamedTuple):
    folder: Path
    files: dict[str, list[str]]  # by class, in the order of folders and file names


def find(root: Path, *, needs_training: bool = True) -> tuple[dict[str, Part], str]:
    """(parts, left out): the image files of a folder by part ("train", "validation", "test") and
    class, and what was left out, in words.

    Links are followed, but every folder is read once. Hidden entries, folders of runs, files
    without an extension of images, broken links and everything that is no regular file are left
    out.

    Args:
        needs_training: False allows a training part that is missing or has no image in any of its
            folders; it is then not among the parts.

    Raises:
        DataError: it is not clear which folders are parts and which are classes; a part has no
            class folders; the folder of a class holds files, but no image; two classes are the same
            folder.
    """
    if not root.is_dir():
        raise DataError(f"root: expected a folder with one subfolder per class, got {root}")
    left_out = LeftOut(root)
    folders = _part_folders(root, left_out, needs_training)
    classes = {part: _class_folders(folder, left_out) for part, folder in folders.items()}
    links = _Links(list(chain.from_iterable(classes.values())))
    parts, empty = {}, []
    for part, folder in folders.items():
        files = {}
        for path in classes[part]:
            of_class = LeftOut(root)
            images = _images(str(path), links, of_class)
            left_out.add_all(of_class)
            if not images and of_class.not_hidden == {_RUN}:
                continue
            files[path.name] = images
            if not images and (part == "train" or of_class.not_hidden):
                empty.append(f"{path}: expected images, got {str(of_class) or 'none'}")
        parts[part] = Part(folder, files)
    if empty:
        known = f"the extensions of images are {' '.join(EXTENSIONS)}"
        more = [f"... and {len(empty) - _SHOWN:,} more classes"] if len(empty) > _SHOWN else []
        raise DataError("\n".join([*empty[:_SHOWN], *more, known]))
    return parts, str(left_out)


def find_images(folder: str) -> tuple[list[str], str]:
    """(images, left out): the image files of a folder at any depth, ordered by folder and then by
    name, and what was left out, in words. The rules are those of `find`.

    Raises:
        DataError: it is no folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"folder: expected a folder of images, got {folder}")
    left_out = LeftOut(root)
    return _images(folder, _Links([root]), left_out), str(left_out)


def _part_folders(root: Path, left_out: LeftOut, needs_training: bool) -> dict[str, Path]:
    """The folders of the parts that root has; root itself for training if it holds classes."""
    folders = _subfolders(root)
    parts: dict[str, list[Path]] = {}
    others = []
    for folder in folders:
        part = _PART_OF.get(folder.name.lower())
        if part is None:
            others.append(folder)
        else:
            parts.setdefault(part, []).append(folder)
    if not parts:
        _check_no_parts(root, folders)
        return {"train": root}
    for part, found in parts.items():
        if len(found) > 1:
            raise DataError(f"{root}: expected one folder for the {part} part, got {_names(found)}")
    given = [folders[0] for folders in parts.values()]
    links = _Links(list(chain.from_iterable(map(_subfolders, given))))
    reasons = {folder: _why_no_class(folder, links) for folder in others}
    classes = [folder for folder, reason in reasons.items() if not reason]
    if classes:
        raise DataError(
            f"{root}: expected folders of parts or of classes, got parts by name, {_names(given)}, "
            f"beside {_names(classes)}; {_KNOWN}. {_CURE}"
        )
    if not needs_training and "train" in parts and _why_no_class(parts["train"][0], _Links([])):
        del parts["train"]
    if needs_training and "train" not in parts:
        raise DataError(
            f"{root}: expected a training part beside {_names(given)}, got none; {_KNOWN}. {_CURE}"
        )
    for folder, reason in reasons.items():
        left_out.add(reason, str(folder))
    _leave_out_files(root, left_out)
    return {part: folders[0] for part, folders in parts.items()}


def _why_no_class(folder: Path, links: _Links) -> str:
    """Why a folder beside parts is taken for no class; nothing if it holds images."""
    try:
        has_images = any(_image_files(str(folder), links, LeftOut(folder)))
    except OSError:
        return "folder that cannot be read"
    return "" if has_images else "folder without images"


def _check_no_parts(root: Path, classes: list[Path]) -> None:
    """Raises DataError if folders that would be classes look like parts under other names."""
    for_training, for_others = [], []
    for folder in classes:
        words = set(re.findall("[a-z]+", folder.name.lower()))
        if words.intersection(PART_NAMES["train"]):
            for_training.append(folder)
        elif words.intersection(_PART_OF):
            for_others.append(folder)
        inside = {_PART_OF.get(sub.name.lower()) for sub in _subfolders(folder)}
        if "train" in inside and inside & {"validation", "test"}:
            raise DataError(
                f"{root}: expected class folders, got {folder}, which holds the parts of a data "
                f"set; give {folder} as the folder"
            )
    if for_training and for_others:
        found = [*for_training, *for_others]
        raise DataError(
            f"{root}: expected class folders, got {_names(found)}, which look like parts; "
            f"{_KNOWN}. {_CURE}"
        )


def _class_folders(folder: Path, left_out: LeftOut) -> list[Path]:
    found = _subfolders(folder)
    _leave_out_files(folder, left_out)
    if not found:
        n = len(_entries(str(folder)))
        raise DataError(f"{folder}: expected one subfolder per class, got none among {n:,} entries")
    return found


def _subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, in order, without those that are no data."""
    folders = filter(_is_folder, _entries(str(folder)))
    return [folder / entry.name for entry in folders if not _why_no_data(entry, is_folder=True)]


def _leave_out_files(folder: Path, left_out: LeftOut) -> None:
    for entry in _entries(str(folder)):
        is_folder = _is_folder(entry)
        if reason := _why_no_data(entry, is_folder=is_folder):
            left_out.add(reason, entry.path)
        elif not is_folder:
            left_out.add(_why_no_image(entry) or "outside of the class folders", entry.path)


class _Links:
    """Which links to folders are followed inside a class folder: those that lead neither into a
    class folder, nor to a folder around a class folder or around the link, nor to one that was
    read.

    Raises:
        DataError: two class folders are the same, or one lies in another.
    """

    def __init__(self, classes: list[Path]) -> None:
        real = [path.resolve() for path in classes]
        self._around = {parent for path in set(real) for parent in path.parents}
        self._classes: dict[Path, Path] = {}
        for path, target in zip(classes, real, strict=True):
            other = self._classes.setdefault(target, path)
            if other != path:
                raise DataError(f"{path}: expected a folder of its own, got the same as {other}")
            if target in self._around:
                raise DataError(f"{path}: expected a folder of one class, got one around classes")
        self._read: set[tuple[int, int]] = set()

    def enter(self, folder: str) -> bool:
        """Whether a folder is read for the first time."""
        status = os.stat(folder)
        key = (status.st_dev, status.st_ino)
        is_new = key not in self._read
        self._read.add(key)
        return is_new

    def leads_elsewhere(self, link: str) -> bool:
        target, here = Path(link).resolve(), Path(link).parent.resolve()
        inside = not self._classes.keys().isdisjoint((target, *target.parents))
        return not inside and target not in self._around and target not in here.parents


def _images(folder: str, links: _Links, left_out: LeftOut) -> list[str]:
    """The image files below a class folder: ordered by folder, then by name."""
    return sorted(_image_files(folder, links, left_out), key=os.path.split)


def _image_files(folder: str, links: _Links, left_out: LeftOut) -> Iterator[str]:
    pending = [folder]
    links.enter(folder)
    while pending:
        for entry in _entries(pending.pop()):
            is_folder = _is_folder(entry)
            if reason := _why_no_data(entry, is_folder=is_folder):
                left_out.add(reason, entry.path)
            elif is_folder:
                follow = not entry.is_symlink() or links.leads_elsewhere(entry.path)
                if follow and links.enter(entry.path):
                    pending.append(entry.path)
                else:
                    left_out.add("link to a folder that is read elsewhere", entry.path)
            elif reason := _why_no_image(entry):
                left_out.add(reason, entry.path)
            else:
                yield entry.path


def _why_no_image(entry: os.DirEntry[str]) -> str:
    """Why an entry that is no folder is not read as an image; nothing if it is."""
    if entry.is_symlink() and not os.path.exists(entry.path):
        return "broken link"
    if not (os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file()):
        return "pipe, socket or device"
    extension = os.path.splitext(entry.name)[1]
    if extension.lower() in EXTENSIONS:
        return ""
    return f"named {extension.lower()}" if extension else "named without an extension"


def _why_no_data(entry: os.DirEntry[str], *, is_folder: bool) -> str:
    """Why nothing of an entry is read as data; nothing if something may be."""
    if entry.name.startswith(".") or entry.name in _ADDED:
        return _HIDDEN
    return _RUN if is_folder and _is_run(entry.path) else ""


def _is_run(folder: str) -> bool:
    """Whether a run wrote into the folder, and it is not a class with images as well."""
    return all(os.path.exists(os.path.join(folder, name)) for name in _RUN_NAMES) and not any(
        entry.name.lower().endswith(EXTENSIONS) for entry in _entries(folder)
    )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Also for a link to a folder. DirEntry alone raises for a link to itself."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _entries(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _names(folders: list[Path]) -> str:
    shown = ", ".join(folder.name for folder in folders[:_SHOWN])
    return shown + (", ..." if len(folders) > _SHOWN else "")
