"""How many units every weight keeps so that masks meet a budget, in one shot or at each step of a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor

from secateur import patterns
from secateur.allocate.ladder import Counts, Ladder, Strategy, climb
from secateur.budget import Budget, kept_count
from secateur.errors import BudgetError
from secateur.graph.types import Weight
from secateur.names import matching
from secateur.patterns import Pattern


@dataclass(frozen=True)
class Whole:
    """What budgets are parts of: parameters and multiply-adds of the whole dense model."""

    params: int
    macs: int = 0


def counts(
    weights: Mapping[str, Weight],
    dense: Whole,
    pattern: Pattern,
    wish: Budget,
    units: Mapping[str, Tensor],
    total: Mapping[str, int],
    strategy: Strategy,
    overrides: Mapping[str, float],
) -> dict[str, int]:
    """Units that each weight in ``units`` keeps, the most that the budget leaves room for.

    units: flat unit scores, of ``total`` units a weight; where processes share a weight, those that are here.
    Raises BudgetError, with the nearest possible value, for a budget that masks cannot meet.
    """
    size = patterns.unit_size(pattern)
    places = [(n, weights[n]) for n in units]
    edges = {n: s for n, w in places if (s := patterns.edge_sizes(pattern, w)) is not None}
    kept_in = {n: s[units[n].argsort(descending=True, stable=True).cpu()].cumsum(0) for n, s in edges.items()}

    def elements(kept: Counts) -> dict[str, int]:
        ragged = {n: int(sums[kept[n] - 1]) if kept[n] else 0 for n, sums in kept_in.items()}
        return {n: ragged.get(n, kept[n] * size) for n, _ in places}

    def cost(kept: Counts) -> float:
        stay = elements(kept)
        if wish.kind == "macs":
            return dense.macs - sum(w.macs * (1 - stay[n] / w.numel) for n, w in places)
        gone = sum(w.numel - stay[n] for n, w in places)
        return (sum(w.numel for _, w in places) if wish.kind == "sparsity" else dense.params) - gone

    everything = cost(total)
    if wish.kind in ("size", "latency"):
        raise BudgetError(
            f"{wish} cannot be met by pattern {pattern}: zeros in dense tensors take the same bytes and the same time, "
            f"so the nearest possible is {wish.kind}=100%; use pattern='channel', or a sparsity budget"
        )
    limit = limit_of(wish, everything)
    fixed = fixed_counts(overrides, total)

    def shaped(kept: Counts) -> dict[str, int]:
        return {n: fixed.get(n, count) for n, count in kept.items()}

    ladder = ladder_of(strategy, units, {n: [w.shape] for n, w in places})
    if size == 1 and not fixed and wish.kind in ("sparsity", "params"):
        exact = ladder.kept(min(ladder.rungs, max(0, round(everything - limit))))
        if cost(exact) == limit:  # rungs usually count single weights, so this one is known without a search
            return exact
    found = climb(ladder, shaped, lambda kept: cost(kept) <= limit)
    if found is None:
        raise unmet(wish, cost(shaped(ladder.kept(ladder.rungs))), everything)
    return found


def ladder_of(
    strategy: Strategy,
    units: Mapping[str, Tensor],
    shapes: Mapping[str, list[tuple[int, ...]]],
    *,
    relative: bool = False,
) -> Ladder:
    """The strategy's ladder, given what it asks for."""
    if "shapes" not in getattr(strategy, "needs", ()):
        return strategy(units, relative)
    return strategy(units, relative, shapes=shapes)


def limit_of(wish: Budget, everything: float) -> float:
    """What may remain of the whole."""
    if wish.kind == "sparsity":
        return kept_count(wish.value, int(everything))
    return wish.limit(everything)


def fixed_counts(overrides: Mapping[str, float], total: Mapping[str, int]) -> dict[str, int]:
    """Kept counts of the places that an override names; the last glob that matches counts."""
    fixed = {}
    for glob, part in overrides.items():
        for name in matching([glob], total, "override"):
            fixed[name] = kept_count(Fraction(str(part)), total[name])
    return fixed


def unmet(wish: Budget, least: float, everything: float) -> BudgetError:
    """The error for a budget that cannot be met, where ``least`` of the whole must remain."""
    part = least / everything if everything else 1.0
    nearest = f"sparsity={1 - part:.2%}" if wish.kind == "sparsity" else f"{wish.kind}={part:.2%} ({least:,.0f})"
    return BudgetError(
        f"{wish} cannot be met: what is frozen, ignored, fixed by overrides, or kept as a minimum leaves more than "
        f"that; the nearest possible is {nearest}",
        part,
    )
