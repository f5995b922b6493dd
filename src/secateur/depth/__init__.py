"""Dropping whole blocks, alone or together with channels under one budget.

``layer``: the block with the lowest score goes first, until the budget is met; what the last one made needless comes
back, highest score first.

``channel+layer``: blocks go in that same order, and after each the channels make up what the budget still asks for.
Of these plans, from no block at all to blocks alone, the one that changes the model's output least is taken (squared
error on the calibration data, before any recovery): one measure for both kinds of units.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
from torch import Tensor, nn

from secateur import criteria, patterns, planning
from secateur.allocate import Allocation, Sensitivity, Strategy, limit_of, resolve, unmet
from secateur.apply.oracle import ZeroedProgram
from secateur.budget import Budget
from secateur.budget import parse as parse_budget
from secateur.criteria import Criterion
from secateur.depth.scores import CRITERIA, Calibration, Rank, ranking, squared
from secateur.errors import BudgetError, SpecError
from secateur.graph.graph import Graph
from secateur.graph.trace import run
from secateur.graph.types import Flags
from secateur.names import Choice, chosen
from secateur.plan import Plan
from secateur.planning import Described, assemble, describe, measure_of
from secateur.sensitivity import measure
from secateur.stats import Stats
from secateur.tasks import Task, plain

ONLY_BLOCKS = ("influence", "reconstruction")
"""Criteria that score blocks and no single weights."""

BATCHES = 8
"""Calibration batches that different splits between blocks and channels are compared on."""


def make(
    model: nn.Module,
    graph: Graph,
    *,
    pattern: str = "channel",
    budget: str | None = "macs=50%",
    criterion: str | Criterion | None = None,
    task: Task | None = None,
    ignore: Choice | Sequence[Choice] = (),
    seed: int = 0,
    **axes: Any,
) -> Plan:
    """``planning.make`` for every pattern, those that drop blocks included.

    criterion: by default magnitude, for blocks influence. Blocks know those of ``scores.CRITERIA``; in
    ``channel+layer`` each kind of unit takes the criterion where it knows it, its default otherwise.
    ignore: blocks too, by name; a block that holds an ignored weight stays. axes: further arguments of
    ``planning.make``, about units of axes: allocate, overrides, minimum, equal. Raises, besides, SpecError where a
    wish does not fit blocks.
    """
    model, shape = plain(model), patterns.parse(pattern)
    wishes: dict[str, Any] = {"pattern": pattern, "task": task, "ignore": ignore, "seed": seed}
    axes["allocate"] = measured(axes.get("allocate", "global"), model, graph, {**wishes, "criterion": criterion})
    if not isinstance(shape, patterns.Layer | patterns.Both):
        return planning.make(model, graph, budget=budget, criterion=criterion or "magnitude", **wishes, **axes)
    wish = parse_budget(budget) if budget is not None else None
    if wish is None or wish.kind == "max_drop":
        raise SpecError(f"pattern {pattern!r} needs a budget of size, such as macs=50%; found {budget!r}")
    ignored, free = _free(model, graph, ignore)
    if isinstance(shape, patterns.Layer):
        if axes.get("overrides") or axes.get("minimum", 1) != 1 or axes.get("equal"):
            raise SpecError("overrides, minimum and equal count units of axes, which pattern 'layer' does not remove")
        blocks_by = criterion if criterion is not None else "influence"
        gone = _drop(graph, wish, free, ranking(blocks_by, model, graph, free, task, seed))
        return _plan(graph, describe(pattern, wish, blocks_by, "", seed), {}, free, gone)
    by = criterion if criterion is not None and criterion not in ONLY_BLOCKS else "magnitude"
    blocks_by = criterion if criterion in CRITERIA else "influence"
    rank = ranking(blocks_by, model, graph, free, task, seed)
    scores = criteria.score(model, graph, by, task, seed)
    scored = _again(scores, losses=criteria.gives_losses(by))

    def channels(gone: Collection[str], rest: Callable[[Graph], str]) -> dict[str, Flags]:
        """The units that stay of the model without some blocks. Raises BudgetError."""
        left = graph.without(gone)
        known = {*left.weights, *(a.name for a in left.axes)} & ignored
        found = planning.make(
            model,
            left,
            pattern=str(shape.channel),
            budget=rest(left),
            criterion=scored,
            ignore=known.__contains__ if known else (),
            seed=seed,
            **(_alive(axes, left) if gone else axes),
        )
        return {name: flags.numpy() for name, flags in found.units.items()}

    gone, units = _together(graph, wish, _order(free, rank), channels, Calibration(model, graph, task))
    described = describe(pattern, wish, f"{_label(by)}+{blocks_by}", axes.get("allocate", "global"), seed)
    return _plan(graph, described, units, free, gone)


def _again(scores: Mapping[str, Tensor], *, losses: bool) -> Criterion:
    """A criterion that gives scores taken before."""

    def scored(weight: Tensor, stats: Stats) -> Tensor:
        return scores[stats.name]

    return criteria.in_loss_units(scored) if losses else scored


def measured(allocate: str | Strategy, model: nn.Module, graph: Graph, wishes: Mapping[str, Any]) -> str | Strategy:
    """The allocation as it is, or with sensitivity curves where it goes by some and has none yet.

    wishes: arguments of ``make``, pattern, criterion, task, ignore and seed among them.
    """
    if isinstance(patterns.parse(wishes["pattern"]), patterns.Layer | patterns.NM):
        return allocate  # these have nothing to allocate
    strategy = resolve(allocate)
    if not isinstance(strategy, Sensitivity) or strategy.curves is not None:
        return allocate
    by = wishes["criterion"]
    asked = {name: wishes[name] for name in ("pattern", "task", "seed")}
    asked["criterion"] = by if by is not None and by not in ONLY_BLOCKS else "magnitude"
    places = [*graph.weights, *(a.name for a in graph.axes)]
    known = chosen(wishes["ignore"], [*places, *(b.name for b in graph.blocks)], model, "ignore") & set(places)
    ignored = known.__contains__ if known else ()
    return replace(strategy, curves=measure(model, graph, ignore=ignored, folder=strategy.folder, **asked))


def _free(model: nn.Module, graph: Graph, ignore: Choice | Sequence[Choice]) -> tuple[set[str], list[str]]:
    """What is ignored, and the blocks that may go: not ignored themselves, and without an ignored weight in them."""
    names = [*graph.weights, *(a.name for a in graph.axes), *(b.name for b in graph.blocks)]
    ignored = chosen(ignore, names, model, "ignore")
    free = [b.name for b in graph.blocks if not b.frozen and b.name not in ignored]
    return ignored, [name for name in free if ignored.isdisjoint(graph.slices(_off([name])))]


def _off(gone: Collection[str]) -> dict[str, Flags]:
    return {name: np.zeros(1, bool) for name in gone}


def _order(free: Sequence[str], rank: Rank) -> Iterator[list[str]]:
    """Nothing, then one block more at a time: of those left, the one with the lowest score."""
    gone: list[str] = []
    yield list(gone)
    while len(gone) < len(free):
        scores = rank(gone)
        gone.append(min((name for name in free if name not in gone), key=scores.__getitem__))
        yield list(gone)


def _drop(graph: Graph, wish: Budget, free: Sequence[str], rank: Rank) -> list[str]:
    """The blocks that go, for a budget to be met by blocks alone."""
    if wish.kind == "threshold":
        return [name for name, score in rank(()).items() if score < float(wish.value)]
    measure = measure_of(wish)
    everything = measure(graph.cost())
    limit = limit_of(wish, everything)

    def fits(gone: Collection[str]) -> bool:
        return measure(graph.cost(_off(gone))) <= limit

    gone = next((gone for gone in _order(free, rank) if fits(gone)), None)
    if gone is None:
        if not free:
            reasons = "; ".join(sorted({b.frozen for b in graph.blocks if b.frozen})[:3])
            none = "all are ignored" if graph.blocks else "the model has no residual blocks"
            raise BudgetError(f"{wish} cannot be met: no block is free to go ({reasons or none})", 1.0)
        raise unmet(wish, measure(graph.cost(_off(free))), everything)
    return _come_back(gone, fits)


def _come_back(gone: list[str], fits: Callable[[Collection[str]], bool]) -> list[str]:
    """Without the blocks that the last ones made needless."""
    for name in reversed(gone):
        fewer = [other for other in gone if other != name]
        gone = fewer if fits(fewer) else gone
    return gone


def _together(
    graph: Graph,
    wish: Budget,
    order: Iterator[list[str]],
    channels: Callable[[Collection[str], Callable[[Graph], str]], dict[str, Flags]],
    data: Calibration,
) -> tuple[list[str], dict[str, Flags]]:
    """The blocks that go and the units that stay of the rest: the split that the model's output feels least."""
    if wish.kind == "threshold":
        raise SpecError(f"{wish} compares scores of one kind, and blocks have others than channels; name a size")
    measure = measure_of(wish)
    everything = measure(graph.cost())
    limit = limit_of(wish, everything)
    found: list[tuple[float, list[str], dict[str, Flags]]] = []
    least = float(everything)

    def fits(gone: Collection[str]) -> bool:
        return measure(graph.cost(_off(gone))) <= limit

    for gone in order:
        blocks = measure(graph.cost(_off(gone)))
        gone = _come_back(gone, fits) if blocks <= limit else gone
        try:
            units = channels(gone, lambda left: _rest(wish, limit, left)) if blocks > limit else {}
        except BudgetError as error:
            least = min(least, blocks * (error.nearest if error.nearest is not None else 1.0))
            continue
        found.append((_error(data, gone, units), gone, units))
        if blocks <= limit:
            break
    if not found:
        raise unmet(wish, least, everything)
    _, gone, units = min(found, key=lambda split: split[0])
    return gone, units


def _rest(wish: Budget, limit: float, left: Graph) -> str:
    """The budget for what is left of the model, in numbers of its own."""
    if wish.kind == "sparsity":
        part = Fraction(int(limit), left.cost().weights)
        percent = math.ceil((1 - part) * 10**10)
        return f"sparsity={percent // 10**8}.{percent % 10**8:08d}%"
    return f"{wish.kind}={max(1, int(limit))}{'B' if wish.kind == 'size' else ''}"


def _error(data: Calibration, gone: Collection[str], units: Mapping[str, Flags]) -> float:
    """Squared error of the model's output relative to its square, over the first batches of the calibration data."""
    if any(p.is_meta for p in data.model.parameters()):  # without values there is nothing to compare
        return 0.0
    error = total = 0.0
    for inputs, _ in itertools.islice(data, BATCHES):
        graph = data.graph_of(inputs)
        left = graph.without(gone)
        dense = run(graph.program.module, inputs)
        error += squared(run(ZeroedProgram(left.program, data.model, left.alive(units)), inputs), dense)
        total += squared(dense)
    return error / max(total, 1e-30)


def _alive(axes: Mapping[str, Any], left: Graph) -> dict[str, Any]:
    """Wishes about axes without the globs and names of those that went with their blocks."""
    names = [a.name for a in left.axes]
    found = {
        what: {glob: value for glob, value in wish.items() if fnmatch.filter(names, glob)}
        for what, wish in axes.items()
        if isinstance(wish, Mapping)
    }
    equal = [[name for name in group if name in names] for group in axes.get("equal", ())]
    return {**axes, **found, "equal": equal}


def _label(criterion: str | Criterion) -> str:
    return criterion if isinstance(criterion, str) else getattr(criterion, "__name__", "custom")


def _plan(
    graph: Graph, described: Described, units: Mapping[str, Flags], free: Sequence[str], gone: Collection[str]
) -> Plan:
    keep = {**units, **{name: np.array([name not in gone]) for name in free}}
    kept, total = ({n: int(count(f)) for n, f in keep.items()} for count in (np.sum, len))
    return assemble(graph, described, Allocation(kept, total), keep=keep)
