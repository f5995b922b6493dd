"""Ladders, and how a budget is met on the first rung that fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol


class Ladder(Protocol):
    """Counts from everything (rung 0) to nothing (rung ``rungs``)."""

    rungs: int

    def kept(self, rung: int) -> dict[str, int]: ...


Strategy = Callable[..., Ladder]
"""``strategy(scores, relative)``: flat unit scores per place; ``relative`` where their scales differ by place."""

Counts = Mapping[str, int]


def climb(
    ladder: Ladder, shape: Callable[[Counts], dict[str, int]], fits: Callable[[Counts], bool]
) -> dict[str, int] | None:
    """The counts of the lowest rung that fits, by bisection; None where even the last one does not.

    shape: what the pattern makes of raw counts (multiples, minima, overrides).
    """
    low, high = 0, ladder.rungs
    found = shape(ladder.kept(high))
    if not fits(found):
        return None
    while low < high:
        middle = (low + high) // 2
        counts = shape(ladder.kept(middle))
        if fits(counts):
            high, found = middle, counts
        else:
            low = middle + 1
    return found
