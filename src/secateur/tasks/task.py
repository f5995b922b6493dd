"""What Secateur needs to know about a user's problem: data, loss and score."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from secateur.errors import DataError

SPLITS = ("train", "calibration", "validation", "test")

CALIBRATION = 512
"""Examples of the training split that serve as calibration split where none is given."""


class Task(Protocol):
    """What Secateur needs to know about a user's problem.

    A task may also have ``summary(outputs)``: numbers of a whole split by name, for what is no mean over examples, such
    as {"perplexity": 5.4}. ``outputs`` is one pass of ``(output, target)``, to be gone through once.
    """

    def batches(self, split: str) -> Iterable[tuple[Any, Any]]:
        """One pass of ``(inputs, targets)``; inputs is a Tensor, a tuple (positional) or a dict (keyword).

        What is random in it comes from the global random states of torch, NumPy or Python, so that it repeats itself
        under a seed. Splits other than train are the same in every pass.
        """

    def loss(self, output: Any, target: Any) -> Tensor:
        """The mean loss of one batch: a scalar."""

    def scores(self, output: Any, target: Any) -> Tensor:
        """One score per example, larger is better; for classification 1.0 where right and 0.0 where wrong."""


class Pass(Sequence[tuple[Any, Any]]):
    """One pass over a split: ``batch(i)`` for i below ``length``, made when it is asked for.

    It knows its length, and a run that goes on in the middle of it does not make the batches before.
    """

    def __init__(self, length: int, batch: Callable[[int], tuple[Any, Any]]) -> None:
        self.length, self.batch = length, batch

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < self.length:
            raise IndexError(i)
        return self.batch(i)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        # Sequence's own would take an IndexError inside ``batch`` for the end.
        return map(self.batch, range(self.length))


def check_split(split: str) -> None:
    """Raise DataError for a split that no task has."""
    if split not in SPLITS:
        raise DataError(f"split {split!r} is unknown, expected one of {', '.join(SPLITS)}")


def passing(split: str, count: int, size: int, batch: Callable[[list[int]], tuple[Any, Any]]) -> Pass:
    """A pass over the examples 0 to ``count``, ``size`` at a time: ``batch`` of their numbers.

    Those of training come in an order from torch's global generator, and a short last batch of them is dropped.
    """
    check_split(split)
    size = max(1, min(size, count))
    training = split == "train"
    order = torch.randperm(count) if training else torch.arange(count)
    length = count // size if training else -(-count // size)
    return Pass(length, lambda i: batch(order[i * size : (i + 1) * size].tolist()))


def logits_of(output: Any) -> Tensor:
    """The output, or what it carries as ``.logits``. Raises DataError where that is no tensor."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise DataError(
            f"the model gave a {type(output).__name__}, expected logits, or an output that carries them as .logits; "
            "load the model with its head"
        )
    return logits
