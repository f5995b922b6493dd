"""Confidence intervals of scores and of their paired difference."""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from secateur.errors import DataError

Scores = NDArray[np.float64]

Z95 = 1.959964
"""Standard deviations either side of the mean that hold 95 % of a normal distribution."""


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
