"""``make``: from scores to a plan. Score, pool into units, allocate within the budget, select."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from importlib import metadata

import numpy as np
import torch
from torch import Tensor, nn

from secateur import patterns
from secateur.allocate import (
    Allocation,
    Counts,
    Strategy,
    Uniform,
    Whole,
    best,
    climb,
    counts,
    fixed_counts,
    ladder_of,
    limit_of,
    together,
    unmet,
)
from secateur.allocate import resolve as resolve_strategy
from secateur.budget import Budget
from secateur.budget import parse as parse_budget
from secateur.criteria import Criterion, gives_losses, maskable, score, units_of
from secateur.errors import BudgetError, PlanError, SpecError
from secateur.graph.graph import Graph
from secateur.graph.types import Axis, Cost, Flags
from secateur.names import Choice, chosen, matching
from secateur.patterns import NM, Both, Channel, Layer, Pattern
from secateur.plan import Plan
from secateur.tasks import Task, plain

Least = int | float
"""Units that stay at least: a count (int), or a part of the axis (float)."""


def make(
    model: nn.Module,
    graph: Graph,
    *,
    pattern: str = "channel",
    budget: str | None = "macs=50%",
    criterion: str | Criterion = "magnitude",
    allocate: str | Strategy = "global",
    task: Task | None = None,
    ignore: Choice | Sequence[Choice] = (),
    overrides: Mapping[str, float] | None = None,
    minimum: Least | Mapping[str, Least] = 1,
    equal: Sequence[Sequence[str]] = (),
    seed: int = 0,
) -> Plan:
    """Choose what stays within the budget. The same arguments give the same plan.

    ignore: what is left alone: globs over weight and axis names, modules, or functions of such a name. overrides: glob
    -> part removed (0 to 1), fixed for those places; the rest meets the budget. minimum: units that every axis keeps at
    least, a count or a part (0.25); or glob over axes -> such, the last one that matches counts. equal: groups of axis
    names that keep the same part of their units. budget may be None for N:M, which fixes its own sparsity.

    Weights without values (device meta) all score one: counts are then real, which units stay is arbitrary.

    Raises SpecError for notation and names that cannot be read, BudgetError, with the nearest possible value, for a
    budget that cannot be met, DataError for weights or scores that are not finite.
    """
    model = plain(model)
    shape, wish = _read(pattern, budget, graph)
    strategy = resolve_strategy(allocate)
    ignored = chosen(ignore, [*graph.weights, *(a.name for a in graph.axes)], model, "ignore")
    fixed = dict(overrides or {})
    for glob, part in fixed.items():
        if not 0 <= part < 1:
            raise SpecError(f"override {glob!r} removes {part}; expected a part from 0 up to 1")
    described = describe(pattern, wish, criterion, allocate, seed)
    if isinstance(shape, Channel):
        if wish is None:
            raise SpecError("pattern 'channel' needs a budget, such as macs=50%")
        limits = (fixed, _least(minimum, graph.axes), together.known(equal, [a.name for a in graph.axes]))
        units = units_of(model, graph, shape, criterion, task, ignored, seed)
        if not units:
            reasons = "; ".join(sorted({a.frozen for a in graph.axes if a.frozen})[:3])
            raise BudgetError(f"{wish} cannot be met: no axis is free to lose units ({reasons or 'all are ignored'})")
        losses = gives_losses(criterion)
        return _channels(graph, shape, wish, units, strategy, losses, *limits, described)
    if minimum != 1 or equal:
        given = f"minimum={minimum!r}" if minimum != 1 else f"equal={equal!r}"
        raise SpecError(f"{given} counts units, which pattern {pattern!r} does not remove; leave it out")
    names = maskable(graph, shape, ignored)
    if absent := [n for n in names if model.get_parameter(n).is_meta]:
        raise SpecError(f"pattern {pattern!r} chooses single weights, and {absent[0]!r} has no values (device meta)")
    if isinstance(shape, NM):
        return _groups(graph, shape, wish, score(model, graph, criterion, task, seed, names), fixed, described)
    if wish is None:
        raise SpecError(f"pattern {shape} needs a budget, such as sparsity=90%")
    return _masks(
        graph, shape, wish, units_of(model, graph, shape, criterion, task, ignored, seed), strategy, fixed, described
    )


def _read(pattern: str, budget: str | None, graph: Graph) -> tuple[Pattern, Budget | None]:
    """Pattern and budget, where plans of this module can be about them."""
    shape, wish = patterns.parse(pattern), parse_budget(budget) if budget is not None else None
    if wish is not None and wish.kind == "max_drop":
        raise SpecError(f"{wish} is a promise about a finished model, not a size; use prune(..., budget={str(wish)!r})")
    if wish is not None and wish.kind == "macs" and graph.program.hidden:
        raise BudgetError(f"{wish} cannot be counted: {graph.program.hidden[0]}; use a budget of params or size")
    if isinstance(shape, Layer | Both):
        raise SpecError(f"pattern {pattern!r} removes blocks, which secateur.depth.make plans")
    return shape, wish


Described = tuple[str, str, dict[str, str | int]]
"""Pattern, budget, and how the plan was made, as a plan notes them."""


def describe(
    pattern: str, wish: Budget | None, criterion: str | Criterion, allocate: str | Strategy, seed: int
) -> Described:
    """What a plan says of itself."""
    meta: dict[str, str | int] = {
        "criterion": criterion if isinstance(criterion, str) else getattr(criterion, "__name__", "custom"),
        "allocate": allocate if isinstance(allocate, str) else getattr(allocate, "__name__", "custom"),
        "seed": seed,
        "secateur": metadata.version("secateur"),
        "torch": torch.__version__,
    }
    return pattern, str(wish) if wish is not None else "", meta


# --- masks -----------------------------------------------------------------------------------------


def _groups(
    graph: Graph,
    pattern: NM,
    wish: Budget | None,
    scores: Mapping[str, Tensor],
    overrides: Mapping[str, float],
    described: Described,
) -> Plan:
    """N:M fixes what it keeps; the groups are chosen weight by weight."""
    if overrides:
        raise SpecError(f"pattern {pattern} fixes its own sparsity; overrides cannot change it, use ignore")
    _require_nm(pattern, wish)
    masks = {n: patterns.nm_mask(pattern, s, graph.weights[n]) for n, s in scores.items()}
    kept = {n: int(m.sum()) for n, m in masks.items()}
    return assemble(graph, described, Allocation(kept, {n: m.numel() for n, m in masks.items()}), masks=masks)


def _masks(
    graph: Graph,
    pattern: Pattern,
    wish: Budget,
    units: Mapping[str, Tensor],
    strategy: Strategy,
    overrides: Mapping[str, float],
    described: Described,
) -> Plan:
    total = {n: u.numel() for n, u in units.items()}
    if wish.kind == "threshold":
        kept = {n: int((u >= float(wish.value)).sum()) for n, u in units.items()} | fixed_counts(overrides, total)
    else:
        cost = graph.cost()
        whole = Whole(cost.params, cost.macs)
        kept = counts(graph.weights, whole, pattern, wish, units, total, strategy, overrides)
    masks = {n: patterns.spread(pattern, best(u, kept[n]), graph.weights[n]) for n, u in units.items()}
    return assemble(graph, described, Allocation(kept, total), masks=masks)


def _require_nm(pattern: NM, wish: Budget | None) -> None:
    own = Fraction(pattern.m - pattern.n, pattern.m)
    if wish is not None and (wish.kind, wish.value) != ("sparsity", own):
        raise BudgetError(
            f"{wish} cannot be met by pattern {pattern}, which removes exactly {float(own):.4%} of every group; "
            f"the nearest possible is sparsity={float(100 * own):g}%: leave the budget out"
        )


# --- channels --------------------------------------------------------------------------------------


def _channels(
    graph: Graph,
    pattern: Channel,
    wish: Budget,
    pooled: Mapping[str, Tensor],
    strategy: Strategy,
    losses: bool,
    overrides: Mapping[str, float],
    least: Mapping[str, int],
    groups: Sequence[Sequence[str]],
    described: Described,
) -> Plan:
    total = {name: len(s) for name, s in pooled.items()}
    fixed = {
        n: _rounded(max(k, least[n]), total[n], pattern.multiple) for n, k in fixed_counts(overrides, total).items()
    }
    order = {name: s.argsort(descending=True, stable=True).numpy() for name, s in pooled.items()}

    def allowed(name: str, count: int) -> int:
        return fixed.get(name, _rounded(max(count, least[name]), total[name], pattern.multiple))

    groups = [members for group in groups if len(members := [n for n in group if n in total and n not in fixed]) > 1]

    def shaped(counts: Counts) -> dict[str, int]:
        return together.level({n: allowed(n, c) for n, c in counts.items()}, total, groups, allowed)

    chosen: dict[str, Flags] = {name: np.ones(n, bool) for name, n in total.items()}

    def flags(counts: Counts) -> dict[str, Flags]:
        for name, count in counts.items():
            if np.count_nonzero(chosen[name]) != count:
                chosen[name] = np.zeros(total[name], bool)
                chosen[name][order[name][:count]] = True
        return dict(chosen)

    if wish.kind == "threshold":
        kept = shaped({n: int((s >= float(wish.value)).sum()) for n, s in pooled.items()})
    else:
        measure = measure_of(wish)
        everything = measure(graph.cost())
        limit = limit_of(wish, everything)
        compared = _per_cost(graph, measure, pooled) if losses else pooled
        weighed = {a.name: sorted({m.tensor for m in a.members} & graph.weights.keys()) for a in graph.axes}
        shapes = {axis: [graph.weights[n].shape for n in weighed[axis]] for axis in compared}
        ladder = ladder_of(strategy, compared, shapes, relative=not losses)
        found = climb(ladder, shaped, lambda counts: measure(graph.cost(flags(counts))) <= limit)
        if found is None:
            smallest = measure(graph.cost(flags(shaped(ladder.kept(ladder.rungs)))))
            raise unmet(wish, smallest, everything)
        best_gone = {n: s[order[n]] / (1 if losses else s.mean()) for n, s in compared.items() if n not in fixed}
        steps = together.steps([*groups, *together.of_one_size(total)] if isinstance(ladder, Uniform) else groups)
        kept = _give_back(found, best_gone, steps, shaped, lambda c: measure(graph.cost(flags(c))) <= limit)
    return assemble(graph, described, Allocation(kept, total), keep=flags(kept))


def _per_cost(graph: Graph, measure: Callable[[Cost], int], losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What each unit's loss buys: divided by what the whole model saves with one unit of its axis less."""
    dense = measure(graph.cost())
    saved = {n: dense - measure(graph.cost({n: np.arange(len(s)) > 0})) for n, s in losses.items()}
    return {n: s / max(saved[n], 1) for n, s in losses.items()}


def _give_back(
    kept: dict[str, int],
    ranked: Mapping[str, Tensor],
    steps: Mapping[str, Sequence[str]],
    shaped: Callable[[Counts], dict[str, int]],
    fits: Callable[[Counts], bool],
) -> dict[str, int]:
    """Use what one rung, wider than the room it had to make, left over: the best units that went come back if they fit.

    ranked: per place that may change, its unit scores from best to worst, comparable between places. steps: the places
    that get a unit back together with one.
    """
    waiting = list(ranked)
    while waiting := [n for n in waiting if kept[n] < len(ranked[n])]:
        name = max(waiting, key=lambda n: float(ranked[n][kept[n]]))
        step = steps.get(name, (name,))
        richer = shaped({**kept, **{n: kept[n] + 1 for n in step}})
        if richer != kept and fits(richer):
            kept = richer
        else:  # nor will it fit later, with less room
            waiting = [n for n in waiting if n not in step]
    return kept


def _least(minimum: Least | Mapping[str, Least], axes: Sequence[Axis]) -> dict[str, int]:
    """Units that each axis keeps at least, of those it has: as the user wishes, and as its operators need."""
    units = {axis.name: axis.units for axis in axes}
    found = dict.fromkeys(units, 1)
    for glob, wish in minimum.items() if isinstance(minimum, Mapping) else [("*", minimum)]:
        if not (type(wish) is int and wish >= 1) and not (type(wish) is float and 0 <= wish <= 1):
            raise SpecError(f"minimum of {glob!r} is {wish!r}; expected a count from 1, or a part from 0.0 to 1.0")
        for name in matching([glob], units, "minimum"):
            asked = wish if isinstance(wish, int) else math.ceil(wish * units[name])
            found[name] = min(units[name], max(1, asked))
    return {axis.name: max(found[axis.name], axis.least) for axis in axes}


def _rounded(count: int, total: int, multiple: int) -> int:
    """Up to the next multiple, or everything."""
    return min(total, -(-count // multiple) * multiple)


def measure_of(wish: Budget) -> Callable[[Cost], int]:
    """What of a cost the budget is about. Raises PlanError for a kind that takes measuring."""
    kinds: dict[str, Callable[[Cost], int]] = {
        "sparsity": lambda c: c.weights,
        "params": lambda c: c.params,
        "macs": lambda c: c.macs,
        "size": lambda c: c.bytes,
    }
    if wish.kind not in kinds:
        raise PlanError(f"{wish} needs measuring, which a plan alone cannot do; use prune(..., budget={str(wish)!r})")
    return kinds[wish.kind]


# --- both ------------------------------------------------------------------------------------------


def assemble(
    graph: Graph,
    described: Described,
    allocation: Allocation,
    masks: Mapping[str, Tensor] | None = None,
    keep: Mapping[str, Flags] | None = None,
) -> Plan:
    """The plan that masks say, or flags of axes and blocks."""
    pattern, budget, meta = described
    slices = {
        tensor: {d: torch.from_numpy(flags) for d, flags in dims.items()}
        for tensor, dims in graph.slices(keep or {}).items()
    }
    shapes = {n: graph.program.tensors[n].shape for n in (*(masks or {}), *slices)}
    units = {n: torch.from_numpy(f) for n, f in (keep or {}).items()}
    return Plan(pattern, budget, allocation, masks or {}, units, slices, shapes, meta, graph, graph.declared)
