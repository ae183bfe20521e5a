"""Any folder of images with one subfolder per class, as it is or made long-tailed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .images import ImageFiles, Transform
from .longtail import choose
from .splits import DataError, Splits
from .transforms import Transforms, image_transforms


def image_folder(
    root: str | Path,
    *,
    imbalance: float | None = None,
    profile: str = "exponential",
    validation_fraction: float = 0.0,
    seed: int = 0,
    transforms: Transforms | None = None,
) -> Splits:
    """The images in root/train/<class>/, root/val/<class>/ (or root/validation/<class>/) and
    root/test/<class>/. The last two are optional. If there is no root/train, the images in
    root/<class>/ are for training.

    Args:
        imbalance: None keeps all training images; a number makes them long-tailed
            (`long_tailed_subset`), with the first class in alphabetical order as the head.
        profile: "exponential" or "step" (`long_tailed_counts`).
        validation_fraction: the share of every class that is held out for validation before the
            rest is made long-tailed; must be 0 if there is a val folder.
        transforms: `image_transforms()` if None.

    Raises:
        DataError: root is no folder, a part has no images, or it has classes that training lacks.
        FileNotFoundError: a part has no class folders, or a training class has no images.
        ValueError: another argument is invalid; the message names it.
    """
    from torchvision.datasets import ImageFolder

    root = Path(root)
    if not root.is_dir():
        raise DataError(f"root: expected a folder with one subfolder per class, got {root}")
    train_folder, validation_folder, test_folder = root, None, None
    if (root / "train").is_dir():
        train_folder = root / "train"
        validation_folder = _first_folder(root / "val", root / "validation")
        test_folder = _first_folder(root / "test")
    if validation_fraction and validation_folder:
        raise ValueError(
            f"validation_fraction: expected 0, since {validation_folder} is the validation part, "
            f"got {validation_fraction}"
        )
    transforms = transforms or image_transforms()
    train = ImageFolder(train_folder)
    paths, targets = [path for path, _ in train.samples], torch.tensor(train.targets)
    kept, held_out = choose(
        targets,
        imbalance=imbalance,
        profile=profile,
        validation_fraction=validation_fraction,
        seed=seed,
    )

    def select(indices: Tensor, transform: Transform) -> ImageFiles:
        return ImageFiles([paths[i] for i in indices.tolist()], targets[indices], transform)

    validation = _part(validation_folder, train.classes, transforms)
    if held_out is not None:
        validation = select(held_out, transforms.evaluate)
    return Splits(
        train=select(kept, transforms.train),
        validation=validation,
        test=_part(test_folder, train.classes, transforms),
        class_names=train.classes,
    )


def _first_folder(*candidates: Path) -> Path | None:
    return next((folder for folder in candidates if folder.is_dir()), None)


def _part(folder: Path | None, class_names: list[str], transforms: Transforms) -> ImageFiles | None:
    """An evaluation part with the class indices of training; classes may be missing in it."""
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes

    if folder is None:
        return None
    unknown = sorted(set(find_classes(folder)[0]) - set(class_names))
    if unknown:
        raise DataError(
            f"{folder}: expected only classes of the training part, got {len(unknown)} more: "
            f"{', '.join(unknown[:5])}"
        )
    samples = ImageFolder.make_dataset(
        str(folder),
        {name: c for c, name in enumerate(class_names)},
        extensions=IMG_EXTENSIONS,
        allow_empty=True,
    )
    if not samples:
        raise DataError(f"{folder}: expected images in its class folders, got none")
    targets = torch.tensor([target for _, target in samples], dtype=torch.int64)
    return ImageFiles([path for path, _ in samples], targets, transforms.evaluate)
