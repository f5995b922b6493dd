"""From scores to counts: strategies are ladders, and a budget is met on the first rung that fits.

A strategy takes ``{place: unit scores}`` and gives a ladder: ``rungs``, and ``kept(rung) -> {place: units}`` that
never grows from one rung to the next; rung 0 keeps everything. Any callable of that form is a strategy.
One whose attribute ``needs`` holds "shapes" is given ``shapes=``, the shapes of the weights of each place.
"""

from __future__ import annotations

from secateur.allocate.allocation import Allocation
from secateur.allocate.erk import ErdosRenyi
from secateur.allocate.globally import Global
from secateur.allocate.kth import best, kth_smallest
from secateur.allocate.ladder import Counts, Ladder, Strategy, climb
from secateur.allocate.masks import Whole, counts, fixed_counts, ladder_of, limit_of, unmet
from secateur.allocate.sensitivity import Curve, Sensitivity, curves_of
from secateur.allocate.uniform import Uniform
from secateur.recipe import choose

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


__all__ = [
    "Allocation",
    "Counts",
    "Curve",
    "Ladder",
    "Sensitivity",
    "Strategy",
    "Uniform",
    "Whole",
    "best",
    "climb",
    "counts",
    "curves_of",
    "fixed_counts",
    "kth_smallest",
    "ladder_of",
    "limit_of",
    "resolve",
    "unmet",
]
