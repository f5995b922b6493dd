"""Scores of everything that may go."""

from __future__ import annotations

from collections.abc import Set

from torch import Tensor, nn

from secateur import patterns
from secateur.criteria.form import Criterion
from secateur.criteria.pooling import pool_units
from secateur.criteria.scoring import each_score, gives_losses
from secateur.errors import SpecError
from secateur.graph.graph import Graph
from secateur.tasks import Task


def units_of(
    model: nn.Module,
    graph: Graph,
    pattern: patterns.Pattern,
    criterion: str | Criterion,
    task: Task | None,
    ignored: Set[str],
    seed: int,
) -> dict[str, Tensor]:
    """The scores of all units that may go, flat, per place: an axis, or for patterns of masks a weight.

    Raises SpecError where a pattern of masks applies to no weight.
    """
    if isinstance(pattern, patterns.Channel):
        free = [a for a in graph.free if a.name not in ignored and ignored.isdisjoint(m.tensor for m in a.members)]
        tensors = {m.tensor for axis in free for m in axis.members}
        scores = each_score(model, graph, criterion, task, seed, [n for n in graph.weights if n in tensors])
        return pool_units(free, scores, total=gives_losses(criterion))
    names = maskable(graph, pattern, ignored)
    scores = each_score(model, graph, criterion, task, seed, names)
    return {n: patterns.pool(pattern, s, graph.weights[n]) for n, s in scores}


def maskable(graph: Graph, pattern: patterns.Pattern, ignored: Set[str]) -> list[str]:
    """The weights that a pattern of masks applies to. Raises SpecError where there are none."""
    names = [n for n, w in graph.weights.items() if n not in ignored and not patterns.why_not(pattern, w)]
    if not names:
        raise SpecError(f"pattern {pattern} applies to none of the {len(graph.weights)} weights; choose another")
    return names
