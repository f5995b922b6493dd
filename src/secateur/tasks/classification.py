"""Examples with one class each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from secateur.errors import DataError
from secateur.tasks.task import CALIBRATION, SPLITS, Pass, check_split, logits_of, passing


def cross_entropy(output: Any, target: Tensor) -> Tensor:
    """The mean over the batch. Raises DataError for a target that the logits do not have, as far as torch notices."""
    try:
        return F.cross_entropy(logits_of(output), target)
    except IndexError as error:
        raise DataError(
            f"the data has a class that the model gives no logits for: {error} "
            "Give labels within, or a model with more outputs"
        ) from error


def right(output: Any, target: Tensor) -> Tensor:
    """1 where the likeliest class is the target, else 0. Raises DataError for a target that the logits do not have."""
    logits = logits_of(output)
    if (last := int(target.max())) >= logits.shape[1]:
        raise DataError(
            f"the data has the class {last}, the model gives logits for {logits.shape[1]}, counted from 0; "
            "give labels within, or a model with more outputs"
        )
    return (logits.argmax(dim=1) == target).float()


@dataclass(frozen=True, eq=False)
class Classification:
    """Classification of examples held in memory, each split a pair ``(x, y)``.

    ``x`` is of shape (examples, ...), ``y`` holds class indices and is of shape (examples,).
    Training batches are shuffled, and ``augment(x, generator)``-ed, anew on every pass; the order
    comes from torch's global generator, as a DataLoader's does: seed it with ``torch.manual_seed``.
    A short last training batch is dropped. Raises DataError where a split's x and y do not match.
    """

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    calibration: tuple[Tensor, Tensor] | None = None
    batch_size: int = 64
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise DataError(f"batch_size is {self.batch_size}, expected at least 1")
        for split in SPLITS:
            x, y = self._examples(split)
            if y.shape != x.shape[:1]:
                raise DataError(
                    f"split {split!r} has x of shape {tuple(x.shape)} and y of shape {tuple(y.shape)}; "
                    f"expected one class index for each of the {len(x)} examples"
                )

    def batches(self, split: str) -> Pass:
        check_split(split)
        x, y = self._examples(split)
        size = max(1, min(self.batch_size, len(x)))
        if split != "train":
            return Pass(-(-len(x) // size), lambda i: (x[i * size : (i + 1) * size], y[i * size : (i + 1) * size]))
        seed = int(torch.randint(2**62, ()))
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))

        def batch(i: int) -> tuple[Tensor, Tensor]:
            rows = order[i * size : (i + 1) * size]
            augmented = self.augment(x[rows], torch.Generator().manual_seed(seed + 1 + i)) if self.augment else x[rows]
            return augmented, y[rows]

        return Pass(len(x) // size, batch)

    def _examples(self, split: str) -> tuple[Tensor, Tensor]:
        if split == "calibration" and self.calibration is None:
            x, y = self.train
            return x[:CALIBRATION], y[:CALIBRATION]
        examples: tuple[Tensor, Tensor] = getattr(self, split)
        return examples

    def loss(self, output: Any, target: Tensor) -> Tensor:
        return cross_entropy(output, target)

    def scores(self, output: Any, target: Tensor) -> Tensor:
        return right(output, target)


@dataclass(frozen=True, eq=False)
class TextClassification:
    """Classification of token sequences: each split a list of index tensors of shape (tokens,), and their classes.

    The model is called with ``input_ids`` and ``attention_mask`` as keywords, both of shape (batch, tokens); shorter
    sequences are filled up with ``pad``. It gives logits of shape (batch, classes), or carries them as ``.logits``.
    Raises DataError where a split's sequences and classes do not match.
    """

    train: tuple[Sequence[Tensor], Tensor]
    validation: tuple[Sequence[Tensor], Tensor]
    test: tuple[Sequence[Tensor], Tensor]
    calibration: tuple[Sequence[Tensor], Tensor] | None = None
    batch_size: int = 32
    pad: int = 0

    def __post_init__(self) -> None:
        for split in SPLITS:
            texts, labels = self._examples(split)
            if labels.shape != (len(texts),):
                raise DataError(
                    f"split {split!r} has {len(texts)} texts and classes of shape {tuple(labels.shape)}; "
                    "expected one class index for each text"
                )

    def batches(self, split: str) -> Pass:
        check_split(split)
        texts, labels = self._examples(split)

        def batch(rows: list[int]) -> tuple[dict[str, Tensor], Tensor]:
            chosen = [texts[i] for i in rows]
            mask = pad_sequence([torch.ones_like(ids) for ids in chosen], batch_first=True)
            ids = pad_sequence(chosen, batch_first=True, padding_value=self.pad)
            return {"input_ids": ids, "attention_mask": mask}, labels[rows]

        return passing(split, len(texts), self.batch_size, batch)

    def _examples(self, split: str) -> tuple[Sequence[Tensor], Tensor]:
        if split == "calibration" and self.calibration is None:
            texts, labels = self.train
            return texts[:CALIBRATION], labels[:CALIBRATION]
        examples: tuple[Sequence[Tensor], Tensor] = getattr(self, split)
        return examples

    def loss(self, output: Any, target: Tensor) -> Tensor:
        return cross_entropy(output, target)

    def scores(self, output: Any, target: Tensor) -> Tensor:
        return right(output, target)
