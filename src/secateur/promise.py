"""The promise ``max_drop=1%``: the smallest model whose score is shown to drop no more than that.

The validation batches are split in two, every other one. On one half candidates are chosen: a bisection over how much
stays looks for the smallest whose drop is below the limit with 95 % confidence, paired on the same examples. On the
other half, which has chosen nothing, not even an epoch of fine-tuning, the candidates that passed are then tested from
the largest to the smallest; the first that fails ends it, and the last one that passed is returned. Tests in an order
that was fixed without their data need no correction for their number (fixed-sequence testing, Maurer et al. 1995;
Angelopoulos et al. 2021, "Learn then Test").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil, sqrt
from typing import Any

from torch import Tensor

from secateur.errors import DataError
from secateur.progress import track
from secateur.tasks import Interval, Scores, Task, paired_difference, proportion
from secateur.tasks.intervals import Z95

TRIES, ANCHORS = 8, (0.75, 0.5)
"""Candidates that are pruned, recovered and evaluated, at most; and the parts that are tried first, so that a check
which fails for the smaller ones still has a safer one to return."""

CHOOSING, CHECKING = 0, 1

Half = Callable[[int], Scores]
"""The scores of a model on one half of the validation examples, or on the other."""


class HalfTask:
    """A task of whose validation batches only every other one is there."""

    def __init__(self, task: Task, half: int) -> None:
        self._task, self._half = task, half

    def batches(self, split: str) -> Iterable[tuple[Any, Any]]:
        """Raises DataError where there is only one validation batch, or none."""
        found = self._task.batches(split)
        return self._every_other(found) if split == "validation" else found

    def _every_other(self, found: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        number, classes = -1, set[Any]()
        for number, batch in enumerate(found):
            if number % 2 == self._half:
                classes |= _classes(batch[1])
                yield batch
        if len(classes) == 1:
            raise DataError(
                f"all validation examples of one half are of class {classes.pop()}, and a score on one class says "
                "nothing of the others; give a validation split with examples of every class"
            )
        if number < 1:
            raise DataError(
                "max_drop= splits the validation batches in two, one half to choose on and one to check on, and there "
                "are fewer than two; give more validation examples, or smaller batches"
            )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)


def _classes(targets: Any) -> set[Any]:
    """The class indices of a batch; other targets than one such index per example count as no single class."""
    if isinstance(targets, Tensor) and targets.dim() == 1 and not targets.is_floating_point():
        return set(targets.tolist())
    return {0, 1}


@dataclass(frozen=True, eq=False)
class Candidate:
    """``part`` is what stays of the dense model; its score and paired drop on the half that chooses, and, where it came
    so far, the drop on the half that checks."""

    part: float
    score: Interval
    chosen: Interval
    checked: Interval | None = None

    def __str__(self) -> str:
        said = f"{self.part:.1%}: drop {_points(self.chosen)} where it was chosen"
        return said + (f", {_points(self.checked)} where it was checked" if self.checked else "")


@dataclass(frozen=True, eq=False)
class Verdict:
    """Every candidate, largest first, and the one that keeps the promise; None where none does."""

    limit: float
    candidates: tuple[Candidate, ...]
    kept: Candidate | None

    def told(self, kind: str) -> tuple[str, str]:
        """The promise in words, for a report. ``kind`` is what the parts are of."""
        tried = f"Tried, by what stays of {kind}: {'; '.join(map(str, self.candidates))}."
        if self.kept is not None and self.kept.checked is not None:
            drop = _points(self.kept.checked)
            return (
                f"With 95 % confidence this model loses at most {100 * self.limit:.4g} points: on the validation half "
                f"that had no part in choosing it, paired with the dense model, it loses {drop}.",
                tried,
            )
        near = min(self.candidates, key=lambda c: c.chosen.value)
        return (
            f"No model could be shown to lose at most {100 * self.limit:.4g} points, so the dense model was left as it "
            f"is. The nearest keeps {near.part:.1%} of {kind} and loses {_points(near.chosen)} where it was chosen.",
            tried,
        )


def keep(before: Half, attempt: Callable[[float], Half], limit: float, least: float, largest: float = 1.0) -> Verdict:
    """Find the smallest model that keeps the promise.

    before: the dense model's scores. attempt: from the part that stays to the scores of such a model, on the same
    examples. limit: the drop of the mean score that may be. Parts from ``least`` to ``largest`` are possible.

    Raises DataError where the examples are too few to show anything.
    """
    dense = {half: before(half) for half in (CHOOSING, CHECKING)}
    for scores in dense.values():
        _require_enough(scores, limit)
    found: dict[float, tuple[Candidate, Half]] = {}
    low, high, anchors = least, largest, iter(ANCHORS)
    for _ in track(range(TRIES), "Keeping the promise"):
        part = next((anchor for anchor in anchors if low < anchor < high), sqrt(low * high))
        small = attempt(part)
        scores = small(CHOOSING)
        tried = Candidate(part, proportion(scores), paired_difference(dense[CHOOSING], scores))
        found[part] = tried, small
        low, high = (low, part) if tried.chosen.high <= limit else (part, high)
        if high <= low * 1.02:
            break
    return _checked(dense[CHECKING], found, limit)


def _checked(dense: Scores, found: Mapping[float, tuple[Candidate, Half]], limit: float) -> Verdict:
    candidates: list[Candidate] = []
    kept: Candidate | None = None
    going = True
    for part in sorted(found, reverse=True):
        tried, small = found[part]
        if going and tried.chosen.high <= limit:
            checked = paired_difference(dense, small(CHECKING))
            tried, going = replace(tried, checked=checked), checked.high <= limit
            kept = tried if going else kept
        candidates.append(tried)
    return Verdict(limit, tuple(candidates), kept)


def _require_enough(before: Scores, limit: float) -> None:
    """Raise DataError where even a model that answers like the dense one could not be shown to keep the promise."""
    if limit > 0 and len(before) > 1 and paired_difference(before, before).high <= limit:
        return
    advice = f"at least {2 * ceil(sqrt(2) * Z95 / limit)} would do" if limit > 0 else "name a limit above 0"
    raise DataError(
        f"max_drop={100 * limit:.4g}% cannot be shown: one half of the validation batches, of which one half chooses "
        f"and one checks, has {len(before)} examples, on which even an equal model may lose more with 95 % confidence; "
        f"{advice} in both together, more where the models differ"
    )


def _points(drop: Interval) -> str:
    return f"{100 * drop.value:.2f} points (at most {100 * drop.high:.2f})"
