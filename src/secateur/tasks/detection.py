"""Boxes round objects, judged as COCO does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.errors import DataError
from secateur.tasks.task import CALIBRATION, SPLITS, Pass, check_split, passing

Array = NDArray[np.float64]
Truth = tuple[Any, Any]
"""Of one image: boxes of shape (objects, 4) as left, top, right, bottom, and their classes of shape (objects,)."""

Found = tuple[Any, Any, Any]
"""Of one image: boxes of shape (boxes, 4), their scores and classes, both of shape (boxes,)."""

OVERLAP = 0.5
"""Intersection over union that a box needs with an object."""


@dataclass(frozen=True)
class Match:
    """The boxes of one image held against its objects, best box first; ``objects`` are their classes."""

    classes: Array
    scores: Array
    right: Array
    objects: Array


@dataclass(frozen=True, eq=False)
class Detection:
    """Detection in images of one size held in memory, each split a tensor (images, ...) and a ``Truth`` per image.

    decode: a batch's output as one ``Found`` per image, overlapping boxes suppressed; called without gradients.
    loss: the mean training loss, of a batch's output and the list of its truths.

    The score of an image is the average precision of its boxes at IoU 0.5, ranked together over all classes; without
    objects 1.0 where nothing is found and 0.0 otherwise. The summary is mAP50 (Lin et al. 2014): the mean over classes
    of the average precision at 101 recalls. Raises DataError where images and truths do not match, and for outputs of
    ``decode`` in another form.
    """

    train: tuple[Tensor, Sequence[Truth]]
    validation: tuple[Tensor, Sequence[Truth]]
    test: tuple[Tensor, Sequence[Truth]]
    decode: Callable[[Any], Sequence[Found]]
    loss: Callable[[Any, list[Truth]], Tensor]
    calibration: tuple[Tensor, Sequence[Truth]] | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        for split in SPLITS:
            images, truths = self._examples(split)
            if len(images) != len(truths):
                raise DataError(f"split {split!r} has {len(images)} images and {len(truths)} truths, expected as many")
            for i, (boxes, classes) in enumerate(truths):
                if len(classes) != len(boxes) or (len(boxes) and np.shape(boxes)[1:] != (4,)):
                    raise DataError(
                        f"truth {i} of split {split!r} has boxes of shape {tuple(np.shape(boxes))} and "
                        f"{len(classes)} classes; expected (objects, 4) and a class for each"
                    )

    def batches(self, split: str) -> Pass:
        check_split(split)
        images, truths = self._examples(split)
        return passing(split, len(images), self.batch_size, lambda rows: (images[rows], [truths[i] for i in rows]))

    def _examples(self, split: str) -> tuple[Tensor, Sequence[Truth]]:
        if split == "calibration" and self.calibration is None:
            images, truths = self.train
            return images[:CALIBRATION], truths[:CALIBRATION]
        examples: tuple[Tensor, Sequence[Truth]] = getattr(self, split)
        return examples

    def matches(self, output: Any, target: Sequence[Truth]) -> list[Match]:
        """What was found in each image of a batch, held against the truth."""
        found = self.decode(output)
        if len(found) != len(target):
            raise DataError(f"decode gave {len(found)} results for {len(target)} images, expected one for each")
        return [match(one, truth) for one, truth in zip(found, target, strict=True)]

    def scores(self, output: Any, target: Sequence[Truth]) -> Tensor:
        return torch.tensor([image_score(m) for m in self.matches(output, target)], dtype=torch.float64)

    def summary(self, outputs: Iterable[tuple[Any, Sequence[Truth]]]) -> dict[str, float]:
        return {"mAP50": mean_ap([m for output, target in outputs for m in self.matches(output, target)])}


def match(found: Found, truth: Truth) -> Match:
    """Best first, every box takes the object of its class that it overlaps most, by half at least, if still there.

    Raises DataError for boxes, scores and classes of other shapes than ``Found`` has.
    """
    boxes, scores, classes = (_array(part) for part in found)
    if boxes.size == 0:
        boxes = boxes.reshape(0, 4)
    if boxes.shape != (len(scores), 4) or scores.shape != classes.shape or scores.ndim != 1:
        raise DataError(
            f"decode gave boxes of shape {boxes.shape}, scores {scores.shape} and classes {classes.shape}; "
            "expected (boxes, 4), (boxes,) and (boxes,)"
        )
    order = np.argsort(-scores, kind="stable")
    boxes, scores, classes = boxes[order], scores[order], classes[order]
    objects, kinds = _array(truth[0]).reshape(-1, 4), _array(truth[1])
    overlap = iou(boxes, objects) * (classes[:, None] == kinds[None])
    right = np.zeros(len(boxes))
    for i in range(len(boxes) if len(objects) else 0):
        best = int(overlap[i].argmax())
        if overlap[i, best] >= OVERLAP:
            right[i] = 1
            overlap[:, best] = 0
    return Match(classes, scores, right, kinds)


def iou(a: Array, b: Array) -> Array:
    """Intersection over union of every box of ``a`` (n, 4) with every box of ``b`` (m, 4)."""
    corner = np.maximum(a[:, None, :2], b[None, :, :2])
    sides = np.clip(np.minimum(a[:, None, 2:], b[None, :, 2:]) - corner, 0, None)
    shared = sides.prod(-1)
    areas = [(x[:, 2:] - x[:, :2]).prod(-1) for x in (a, b)]
    union = np.maximum(areas[0][:, None] + areas[1][None] - shared, 1e-12)
    ratio: Array = shared / union
    return ratio


def image_score(found: Match) -> float:
    """The average precision of one image; see ``Detection`` for one without objects."""
    if not len(found.objects):
        return float(not len(found.scores))
    return _average_precision(found.right, len(found.objects))


def mean_ap(matches: Sequence[Match]) -> float:
    """The mean over classes that occur of the average precision at 101 recalls (Lin et al. 2014), 0 to 1.

    Raises DataError where there are no objects at all.
    """
    objects = np.concatenate([m.objects for m in matches])
    if not len(objects):
        raise DataError("the images have no objects, so there is no average precision; give some that do")
    scores, classes, right = (
        np.concatenate([getattr(m, part) for m in matches]) for part in ("scores", "classes", "right")
    )
    order = np.argsort(-scores, kind="stable")
    classes, right = classes[order], right[order]
    kinds, counts = np.unique(objects, return_counts=True)
    return float(np.mean([_average_precision(right[classes == k], int(n)) for k, n in zip(kinds, counts, strict=True)]))


def _average_precision(right: Array, objects: int) -> float:
    hits = right.cumsum()
    recall, precision = hits / objects, hits / np.arange(1, len(right) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]  # the best at this recall or a higher one
    places = np.searchsorted(recall, np.linspace(0, 1, 101), side="left")
    return float(np.append(precision, 0.0)[np.minimum(places, len(right))].mean())


def _array(values: Any) -> Array:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
    return np.asarray(values, dtype=np.float64)
