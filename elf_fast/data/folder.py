"""Any folder of images with one subfolder per class, as it is or made long-tailed."""

from __future__ import annotations

from pathlib import Path
from unicodedata import normalize

import torch
from torch import Tensor

from .images import ImageFiles, Transform
from .longtail import choose
from .splits import DataError, Splits
from .transforms import Transforms, image_transforms
from .tree import Part, find


def image_folder(
    root: str | Path,
    *,
    imbalance: float | None = None,
    profile: str = "exponential",
    validation_fraction: float = 0.0,
    seed: int = 0,
    transforms: Transforms | None = None,
    exif_orientation: bool = True,
) -> Splits:
    """The images in `root/train/<class>/`, `root/val/<class>/` and `root/test/<class>/`. The last
    two are optional. If root has no part, the images in `root/<class>/` are for training.

    A part may have any of the names in `tree.PART_NAMES`, in upper or lower case. Images are the
    regular files with an extension of `tree.EXTENSIONS`; `Splits.left_out` tells what else was
    found. Links are followed, but every folder is read once.

    Args:
        imbalance: None keeps all training images; a number makes them long-tailed
            (`long_tailed_subset`), with the first class in alphabetical order as the head.
        profile: "exponential" or "step" (`long_tailed_counts`).
        validation_fraction: the share of every class that is held out for validation before the
            rest is made long-tailed; must be 0 if there is a val folder.
        transforms: `image_transforms()` if None.
        exif_orientation: turn images as their EXIF orientation says.

    Raises:
        DataError: root is no folder; it is not clear which folders are parts and which are classes;
            a part has no class folders, no images, or classes that training lacks; a class has no
            images.
        ValueError: another argument is invalid; the message names it.
    """
    parts, left_out = find(Path(root))
    if validation_fraction and "validation" in parts:
        raise ValueError(
            f"validation_fraction: expected 0, since {parts['validation'].folder} is the "
            f"validation part, got {validation_fraction}"
        )
    transforms = transforms or image_transforms()
    class_names = list(parts["train"].files)

    def dataset(part: str, indices: Tensor | None, transform: Transform) -> ImageFiles:
        paths, targets = _samples(parts[part], class_names)
        if indices is not None:
            paths, targets = [paths[i] for i in indices.tolist()], targets[indices]
        folder = str(parts[part].folder)
        return ImageFiles(paths, targets, transform, root=folder, exif_orientation=exif_orientation)

    kept, held_out = choose(
        _samples(parts["train"], class_names)[1],
        imbalance=imbalance,
        profile=profile,
        validation_fraction=validation_fraction,
        seed=seed,
    )
    evaluated = {
        part: dataset(part, None, transforms.evaluate) if part in parts else None
        for part in ("validation", "test")
    }
    if held_out is not None:
        evaluated["validation"] = dataset("train", held_out, transforms.evaluate)
    return Splits(
        train=dataset("train", kept, transforms.train),
        **evaluated,
        class_names=class_names,
        left_out=left_out,
    )


def test_images(
    root: str | Path,
    class_names: list[str],
    *,
    transforms: Transforms | None = None,
    exif_orientation: bool = True,
) -> ImageFiles | None:
    """The test part of a folder whose training images are gone; None if there are training images,
    or no test part.

    Args:
        class_names: [C] of the training part that was there.
        transforms, exif_orientation: as of `image_folder`.

    Raises:
        DataError: as `image_folder`.
    """
    parts, _ = find(Path(root), needs_training=False)
    if "train" in parts or "test" not in parts:
        return None
    paths, targets = _samples(parts["test"], class_names)
    transform = (transforms or image_transforms()).evaluate
    folder = str(parts["test"].folder)
    return ImageFiles(paths, targets, transform, root=folder, exif_orientation=exif_orientation)


def _samples(part: Part, class_names: list[str]) -> tuple[list[str], Tensor]:
    """Paths [N] and targets [N] int64 of a part, with the class indices of training; classes may
    be missing in it."""
    unknown = sorted(set(part.files) - set(class_names))
    if unknown:
        forms = {normalize("NFC", name) for name in class_names}
        alike = [name for name in unknown if normalize("NFC", name) in forms]
        cure = f"; rename {alike[0]}: training has it in other characters" if alike else ""
        raise DataError(
            f"{part.folder}: expected only classes of the training part, got {len(unknown)} more: "
            f"{', '.join(unknown[:5])}{cure}"
        )
    files = [part.files.get(name, []) for name in class_names]
    paths = [path for of_class in files for path in of_class]
    if not paths:
        raise DataError(f"{part.folder}: expected images in its class folders, got none")
    counts = torch.tensor([len(of_class) for of_class in files])
    return paths, torch.arange(len(class_names)).repeat_interleave(counts)
