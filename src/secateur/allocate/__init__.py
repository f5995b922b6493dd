"""From scores to counts: strategies are ladders, and a budget is met on the first rung that fits.

A strategy takes ``{place: unit scores}`` and gives a ladder: ``rungs``, and ``kept(rung) -> {place: units}`` that
never grows from one rung to the next; rung 0 keeps everything. Any callable of that form is a strategy.
One whose attribute ``needs`` holds "shapes" is given ``shapes=``, the shapes of the weights of each place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from secateur.allocate.allocation import Allocation
from secateur.allocate.erk import ErdosRenyi
from secateur.allocate.globally import Global
from secateur.allocate.kth import best, kth_smallest
from secateur.allocate.sensitivity import Curve, Sensitivity, curves_of
from secateur.allocate.uniform import Uniform
from secateur.recipe import choose


class Ladder(Protocol):
    """Counts from everything (rung 0) to nothing (rung ``rungs``)."""

    rungs: int

    def kept(self, rung: int) -> dict[str, int]: ...


Strategy = Callable[..., Ladder]
"""``strategy(scores, relative)``: flat unit scores per place; ``relative`` where their scales differ by place."""

Counts = Mapping[str, int]
STRATEGIES: dict[str, Strategy] = {
    "global": Global,
    "uniform": Uniform,
    "erk": ErdosRenyi,
    "sensitivity": Sensitivity(),
}


def resolve(strategy: str | Strategy) -> Strategy:
    """A strategy by name, by ``module:function``, or as it is. Raises SpecError for anything else."""
    found: Strategy = choose(strategy, STRATEGIES, "allocation")
    return found


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


__all__ = [
    "Allocation",
    "Counts",
    "Curve",
    "Ladder",
    "Sensitivity",
    "Strategy",
    "Uniform",
    "best",
    "climb",
    "curves_of",
    "kth_smallest",
    "resolve",
]
