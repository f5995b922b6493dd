"""Tasks from words: the embedded digits, image folders, NumPy archives, the user's own functions."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from secateur.errors import DataError, MissingExtra
from secateur.recipe import load_callable
from secateur.tasks import CALIBRATION, SPLITS, Classification, Task

FORMS = "digits, a folder of class folders of images, an .npz file, package.module:function, ./file.py:function"

PARTS = (("train", 0.6), ("validation", 0.2), ("test", 0.2))
"""The shares of a data set that comes unsplit; its order is shuffled with a fixed seed first."""

IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's red, green and blue, which pretrained vision models expect."""


def load(spec: str, input_size: int | None = None) -> Task:
    """The task that ``spec`` names: one of the ``FORMS``.

    input_size: the height and width that images of a folder are brought to (224 by default).
    A function is called without arguments and gives a Task. Raises DataError for a missing or
    unusable path, SpecError for a function that cannot be found.
    """
    path = Path(spec)
    if spec == "digits":
        return digits()
    if path.is_dir():
        return image_folder(path, input_size or 224)
    if path.suffix == ".npz":
        return archive(path)
    if ":" not in spec:
        raise DataError(f"there is no data {spec!r}; expected {FORMS}")
    task = load_callable(spec)()
    if not all(callable(getattr(task, name, None)) for name in ("batches", "loss", "scores")):
        raise DataError(f"{spec} gave a {type(task).__name__}, expected a Task with batches, loss and scores")
    return task  # type: ignore[no-any-return]


def digits() -> Classification:
    """1797 handwritten digits of shape (1, 8, 8) in 0 to 1, ten classes (Alpaydin and Kaynak 1998).

    They come with scikit-learn, so nothing is downloaded. Raises MissingExtra without it.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtra("scikit-learn", "demo", "the digits data set") from error
    bunch = load_digits()
    x = torch.from_numpy(bunch.images).float()[:, None] / 16
    return _split(x, torch.from_numpy(bunch.target).long())


def archive(path: Path) -> Classification:
    """The arrays of an ``.npz`` file: ``x`` and ``y``, which are split here, or one pair per split.

    Pairs are ``x_train`` and ``y_train``, ``x_validation`` …, ``x_test`` …, ``x_calibration`` … (optional).
    x is of shape (examples, ...), as floats or as bytes, which are scaled to 0 to 1; y holds class
    indices. Raises DataError where the file is missing, damaged, pickled or has other arrays.
    """
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as an .npz file of plain arrays: {error}") from error
    if {"x", "y"} == set(arrays):
        return _split(*_pair(path, arrays, ""))
    needed = {f"{axis}_{split}" for axis in "xy" for split in ("train", "validation", "test")}
    spare = {"x_calibration", "y_calibration"}
    if set(arrays) not in (needed, needed | spare):
        raise DataError(
            f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}; expected x and y, or {', '.join(sorted(needed))}"
        )
    pairs: dict[str, Any] = {s: _pair(path, arrays, f"_{s}") for s in SPLITS if f"x_{s}" in arrays}
    return Classification(**pairs)


def _pair(path: Path, arrays: Mapping[str, NDArray[Any]], suffix: str) -> tuple[Tensor, Tensor]:
    x, y = arrays[f"x{suffix}"], arrays[f"y{suffix}"]
    if x.ndim < 1 or not (x.dtype == np.uint8 or np.issubdtype(x.dtype, np.floating)):
        raise DataError(f"{path}: x{suffix} is of type {x.dtype} and shape {x.shape}, expected floats or bytes")
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise DataError(
            f"{path}: y{suffix} is of type {y.dtype} and shape {y.shape}, expected one class index per example"
        )
    scale = 255 if x.dtype == np.uint8 else 1
    return torch.from_numpy(x.astype(np.float32) / scale), torch.from_numpy(y.astype(np.int64))


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """Images of class folders, decoded batch by batch: ``(path, class index)`` per example and split.

    Images are resized on the shorter side, cropped to a centred square of ``size`` pixels and normalised
    by ImageNet's mean and deviation: float32 of shape (batch, 3, size, size).
    """

    examples: Mapping[str, tuple[tuple[Path, int], ...]]
    classes: tuple[str, ...]
    size: int
    batch_size: int = 32

    def batches(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        if split not in SPLITS:
            raise DataError(f"split {split!r} is unknown, expected one of {', '.join(SPLITS)}")
        examples = self.examples["train"][:CALIBRATION] if split == "calibration" else self.examples[split]
        order = torch.randperm(len(examples)) if split == "train" else torch.arange(len(examples))
        for start in range(0, len(examples), self.batch_size):
            chosen = [examples[i] for i in order[start : start + self.batch_size].tolist()]
            yield (
                torch.stack([_decode(path, self.size) for path, _ in chosen]),
                torch.tensor([label for _, label in chosen]),
            )

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target)

    def scores(self, output: Tensor, target: Tensor) -> Tensor:
        return (output.argmax(dim=1) == target).float()


def image_folder(path: Path, size: int = 224) -> ImageFolder:
    """The images below ``path/CLASS/``, split here; classes are numbered in the order of their names.

    Raises DataError for a class folder without images, and, once it is read, for an image that
    cannot be decoded; MissingExtra without Pillow.
    """
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise MissingExtra("pillow", "image", "reading images") from error
    folders = sorted(f for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))
    if not folders:
        raise DataError(f"{path} has no folders; expected one per class, with its images inside")
    found: list[tuple[Path, int]] = []
    for label, folder in enumerate(folders):
        images = sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGES)
        if not images:
            raise DataError(
                f"{folder} holds no images; expected files ending in {', '.join(sorted(IMAGES))} "
                f"directly inside one folder per class"
            )
        found += [(image, label) for image in images]
    parts = {name: tuple(found[i] for i in rows.tolist()) for name, rows in _parts(len(found)).items()}
    return ImageFolder(parts, tuple(folder.name for folder in folders), size)


def _decode(path: Path, size: int) -> Tensor:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be decoded as an image: {error}; repair or remove it") from error
    pixels = torch.from_numpy(np.array(square, np.float32)) / 255
    return ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1).contiguous()


def _split(x: Tensor, y: Tensor) -> Classification:
    if len(x) != len(y):
        raise DataError(f"x holds {len(x)} examples and y {len(y)}; expected as many of both")
    parts: dict[str, Any] = {name: (x[rows], y[rows]) for name, rows in _parts(len(x)).items()}
    return Classification(**parts)


def _parts(n: int) -> dict[str, Tensor]:
    """Shuffled example numbers of every split. Raises DataError where one would be empty."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    ends = [round(n * share) for share in np.cumsum([share for _, share in PARTS])]
    parts = dict(zip((name for name, _ in PARTS), order.tensor_split(ends[:-1]), strict=True))
    if not all(map(len, parts.values())):
        raise DataError(f"{n} examples are too few to split into training, validation and test data")
    return parts
