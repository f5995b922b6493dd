"""The user's side: data for calibration, training and evaluation; loss; score."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import sqrt
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from secateur.errors import DataError
from secateur.progress import track

Scores = NDArray[np.float64]

SPLITS = ("train", "calibration", "validation", "test")

CALIBRATION = 512
"""Examples of the training split that serve as calibration split where none is given."""

Z95 = 1.959964
"""Standard deviations either side of the mean that hold 95 % of a normal distribution."""


class Task(Protocol):
    """What Secateur needs to know about a user's problem."""

    def batches(self, split: str) -> Iterable[tuple[Any, Any]]:
        """One pass of ``(inputs, targets)``; inputs is a Tensor, a tuple (positional) or a dict (keyword)."""

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

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target)

    def scores(self, output: Tensor, target: Tensor) -> Tensor:
        return (output.argmax(dim=1) == target).float()


def call(model: nn.Module, inputs: Any) -> Any:
    """``model`` on user inputs: a dict goes in as keyword, a tuple or list as positional arguments."""
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def clone(model: nn.Module) -> nn.Module:
    """A deep copy. Torch's own warning about copying captured programs (2.13) is kept from the user.

    What modules keep of their last computation (``weight`` under weight_norm's hooks) is copied by value.
    """
    held = (value for module in model.modules() for value in vars(module).values())
    computed = {id(v): v.detach().clone() for v in held if isinstance(v, Tensor) and not v.is_leaf}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        return copy.deepcopy(model, computed)


SEVERAL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
"""Wrappers that run a model on several devices."""


def plain(model: nn.Module) -> nn.Module:
    """The model inside what only runs it: ``torch.compile``, ``DataParallel``, ``DistributedDataParallel``."""
    while True:
        if type(model).__name__ == "OptimizedModule":
            inner = model._orig_mod
        elif isinstance(model, SEVERAL):
            inner = model.module
        else:
            return model
        assert isinstance(inner, nn.Module)
        model = inner


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lives; the CPU where it has neither."""
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors, however nested, on ``device``."""
    return tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, batch)


def batches(task: Task, split: str, model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """The task's batches on the model's device. Raises DataError where the split has none."""
    device = device_of(model)
    batch = None
    for batch in task.batches(split):
        inputs, targets = to_device(batch, device)
        yield inputs, targets
    if batch is None:
        raise DataError(f"the {split} split has no batches; give it at least one example")


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Set training or evaluation mode, and give every module its own mode back at the end.

    An exported program refuses, and keeps the mode that it was captured in.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        with suppress(NotImplementedError):
            model.train(training)
        yield
    finally:
        for module, was in modes:
            module.training = was


def evaluate(model: nn.Module, task: Task, split: str) -> Scores:
    """The score of every example of ``split``, in evaluation mode and without gradients.

    Returns float64 of shape (examples,). Raises DataError for an empty split, and for scores that
    are not one finite number per example.
    """
    parts: list[Scores] = []
    with mode(model, training=False), torch.inference_mode():
        for inputs, targets in track(batches(task, split, model), f"Evaluating on {split}"):
            scores = task.scores(call(model, inputs), targets)
            if scores.ndim != 1:
                shape = tuple(scores.shape)
                raise DataError(f"task.scores returned shape {shape}, expected one score per example")
            parts.append(scores.double().cpu().numpy())
    found: Scores = np.concatenate(parts)
    if bad := int((~np.isfinite(found)).sum()):
        raise DataError(
            f"{bad} of {len(found)} scores on the {split} split are NaN or infinite; "
            "check the model's outputs and task.scores"
        )
    return found


class Interval(NamedTuple):
    """An estimate and the bounds of its interval."""

    value: float
    low: float
    high: float


def proportion(scores: Scores) -> Interval:
    """The mean score and its 95 % confidence interval.

    Scores that are all 0 or 1 get Wilson's interval (Wilson 1927), which holds near 0 % and 100 %
    too; others the normal one. Raises DataError for no scores, or a single one other than 0 or 1.
    """
    n, mean = len(scores), _mean(scores)
    if not _binary(scores):
        return _normal(scores)
    centre = (mean + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * sqrt(mean * (1 - mean) / n + Z95**2 / (4 * n**2))
    return Interval(mean, min(mean, max(0.0, centre - half)), max(mean, min(1.0, centre + half)))


def paired_difference(before: Scores, after: Scores) -> Interval:
    """How much the mean score dropped, ``before - after``, and the 95 % confidence interval of that.

    The scores must belong to the same examples in the same order: pairing removes the spread
    that both models share. Scores that are all 0 or 1 get the interval of Bonett and Price (2012),
    which does not shrink to nothing where few examples differ; others the normal one.
    Raises DataError where the two differ in length.
    """
    if before.shape != after.shape:
        raise DataError(f"paired scores must be of the same examples, found {len(before)} and {len(after)}")
    mean = _mean(before - after)
    if not (_binary(before) and _binary(after)):
        return _normal(before - after)
    n = len(before) + 2
    lost = (float((before > after).sum()) + 1) / n
    won = (float((before < after).sum()) + 1) / n
    half = Z95 * sqrt((lost + won - (lost - won) ** 2) / n)
    return Interval(mean, max(-1.0, lost - won - half), min(1.0, lost - won + half))


def _mean(scores: Scores) -> float:
    if not len(scores):
        raise DataError("there are no scores to average; expected one per example")
    return float(scores.mean())


def _binary(scores: Scores) -> bool:
    return bool(np.isin(scores, (0, 1)).all())


def _normal(scores: Scores) -> Interval:
    if len(scores) < 2:
        raise DataError("one score has no spread; give at least two examples")
    mean, half = float(scores.mean()), Z95 * float(scores.std(ddof=1)) / sqrt(len(scores))
    return Interval(mean, mean - half, mean + half)
