"""Examples that fit in memory: the embedded digits, NumPy archives."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.datasets.splits import parts, require_classes
from secateur.errors import DataError, MissingExtra
from secateur.tasks import SPLITS, Classification


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
    return _divided(x, torch.from_numpy(bunch.target).long(), "digits")


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
        return _divided(*_pair(path, arrays, ""), path)
    needed = {f"{axis}_{split}" for axis in "xy" for split in ("train", "validation", "test")}
    spare = {"x_calibration", "y_calibration"}
    if set(arrays) not in (needed, needed | spare):
        raise DataError(
            f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}; expected x and y, or {', '.join(sorted(needed))}"
        )
    pairs: dict[str, Any] = {s: _pair(path, arrays, f"_{s}") for s in SPLITS if f"x_{s}" in arrays}
    for split, (_, y) in pairs.items():
        require_classes(y, split, path)
    return Classification(**pairs)


def _pair(path: Path, arrays: Mapping[str, NDArray[Any]], suffix: str) -> tuple[Tensor, Tensor]:
    x, y = arrays[f"x{suffix}"], arrays[f"y{suffix}"]
    if x.ndim < 1 or not (x.dtype == np.uint8 or np.issubdtype(x.dtype, np.floating)):
        raise DataError(f"{path}: x{suffix} is of type {x.dtype} and shape {x.shape}, expected floats or bytes")
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise DataError(
            f"{path}: y{suffix} is of type {y.dtype} and shape {y.shape}, expected one class index per example"
        )
    if not np.isfinite(x).all():
        raise DataError(f"{path}: x{suffix} holds NaN or infinite values; remove those examples")
    if y.size and y.min() < 0:
        raise DataError(f"{path}: y{suffix} holds the class {y.min()}, expected indices from 0")
    scale = 255 if x.dtype == np.uint8 else 1
    return torch.from_numpy(x.astype(np.float32) / scale), torch.from_numpy(y.astype(np.int64))


def _divided(x: Tensor, y: Tensor, where: object) -> Classification:
    if len(x) != len(y):
        raise DataError(f"x holds {len(x)} examples and y {len(y)}; expected as many of both")
    pairs: dict[str, Any] = {name: (x[rows], y[rows]) for name, rows in parts(len(x)).items()}
    for name, (_, labels) in pairs.items():
        require_classes(labels, name, where)
    return Classification(**pairs)
