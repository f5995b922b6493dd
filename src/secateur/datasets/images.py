"""Folders of images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.datasets.splits import parts, require_classes
from secateur.errors import DataError, MissingExtra
from secateur.tasks import CALIBRATION, Pass, check_split, passing
from secateur.tasks.classification import cross_entropy, right

IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's red, green and blue, which pretrained vision models expect."""

VALIDATION = ("validation", "val", "valid")
"""What the folder of validation images is called."""

Example = tuple[Path, int]


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """Images of class folders, decoded batch by batch: ``(path, class index)`` per example and split.

    Images are resized on the shorter side, cropped to a centred square of ``size`` pixels and normalised
    by ImageNet's mean and deviation: float32 of shape (batch, 3, size, size).
    """

    examples: Mapping[str, tuple[Example, ...]]
    classes: tuple[str, ...]
    size: int
    batch_size: int = 32

    def batches(self, split: str) -> Pass:
        check_split(split)
        examples = self.examples["train"][:CALIBRATION] if split == "calibration" else self.examples[split]

        def batch(rows: list[int]) -> tuple[Tensor, Tensor]:
            chosen = [examples[i] for i in rows]
            images = torch.stack([_decode(path, self.size) for path, _ in chosen])
            return images, torch.tensor([label for _, label in chosen])

        return passing(split, len(examples), self.batch_size, batch)

    def loss(self, output: Any, target: Tensor) -> Tensor:
        return cross_entropy(output, target)

    def scores(self, output: Any, target: Tensor) -> Tensor:
        return right(output, target)


def image_folder(path: Path, size: int = 224) -> ImageFolder:
    """The images below ``path/CLASS/``, split here; or below ``path/train/CLASS/``, ``path/val/CLASS/`` and
    ``path/test/CLASS/``.

    "validation" and "valid" are read as "val". Without a folder for testing, half of the validation images, drawn
    with a fixed seed, are for testing. Classes are numbered in the order of their names.

    Raises DataError for a class folder without images, a split without validation images, with classes that training
    lacks or of one class only, and, once it is read, for an image that cannot be decoded; MissingExtra without Pillow.
    """
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise MissingExtra("pillow", "image", "reading images") from error
    classes = _folders(path / "train" if (path / "train").is_dir() else path)
    found = _given(path, classes) if (path / "train").is_dir() else _divided(_images(path, classes))
    for split, examples in found.items():
        require_classes(torch.tensor([label for _, label in examples]), split, path)
    return ImageFolder(found, classes, size)


def _given(path: Path, classes: tuple[str, ...]) -> dict[str, tuple[Example, ...]]:
    """The examples of each split's own folder."""
    folder = next((path / name for name in VALIDATION if (path / name).is_dir()), None)
    if folder is None:
        raise DataError(f"{path} has a folder train but none of {', '.join(VALIDATION)}; add one to choose by")
    for other in (folder, path / "test"):
        if other.is_dir() and (unknown := set(_folders(other)) - set(classes)):
            raise DataError(f"{other} has a class {min(unknown)!r} that {path / 'train'} lacks; it has {classes}")
    held = _images(folder, classes)
    if (path / "test").is_dir():
        test = _images(path / "test", classes)
    else:
        order = torch.randperm(len(held), generator=torch.Generator().manual_seed(0)).tolist()
        held, test = (tuple(held[i] for i in rows) for rows in (order[::2], order[1::2]))
    return {"train": _images(path / "train", classes), "validation": held, "test": test}


def _divided(examples: tuple[Example, ...]) -> dict[str, tuple[Example, ...]]:
    return {name: tuple(examples[i] for i in rows.tolist()) for name, rows in parts(len(examples)).items()}


def _folders(path: Path) -> tuple[str, ...]:
    found = sorted(f.name for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))
    if not found:
        raise DataError(f"{path} has no folders; expected one per class, with its images inside")
    return tuple(found)


def _images(path: Path, classes: tuple[str, ...]) -> tuple[Example, ...]:
    found: list[Example] = []
    for label, name in enumerate(classes):
        if not (path / name).is_dir():
            continue  # a class that only training has
        images = sorted(f for f in (path / name).iterdir() if f.suffix.lower() in IMAGES)
        if not images:
            raise DataError(
                f"{path / name} holds no images; expected files ending in {', '.join(sorted(IMAGES))} "
                f"directly inside one folder per class"
            )
        found += [(image, label) for image in images]
    return tuple(found)


def _decode(path: Path, size: int) -> Tensor:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be decoded as an image: {error}; repair or remove it") from error
    pixels = torch.from_numpy(np.array(square, np.float32)) / 255
    return ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1).contiguous()
