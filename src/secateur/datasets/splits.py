"""Splitting what comes unsplit, and what a split must have."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from secateur.errors import DataError

PARTS = (("train", 0.6), ("validation", 0.2), ("test", 0.2))
"""The shares of a data set that comes unsplit."""


def parts(n: int, *, shuffled: bool = True) -> dict[str, Tensor]:
    """Example numbers of every split, shuffled with a fixed seed first. Raises DataError where one would be empty."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)) if shuffled else torch.arange(n)
    ends = [round(n * share) for share in np.cumsum([share for _, share in PARTS])]
    found = dict(zip((name for name, _ in PARTS), order.tensor_split(ends[:-1]), strict=True))
    if not all(map(len, found.values())):
        raise DataError(f"{n} examples are too few to split into training, validation and test data")
    return found


def require_classes(labels: Tensor, split: str, where: object) -> None:
    """Raise DataError where the split is empty, or all its examples are of one class."""
    if not len(labels):
        raise DataError(f"{where}: the {split} split is empty; give examples of at least two classes")
    if bool((labels == labels[0]).all()):
        raise DataError(
            f"{where}: all {len(labels)} examples of the {split} split are of class {int(labels[0])}, so that a model "
            "which always says so would be right; give examples of at least two classes"
        )
