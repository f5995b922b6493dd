"""From scores to masks inside a training: the patterns, strategies and counts of one-shot pruning, on what is here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from secateur import patterns
from secateur.allocate import Allocation, Strategy, Whole, counts
from secateur.allocate.erk import ErdosRenyi
from secateur.allocate.globally import Global
from secateur.allocate.uniform import Uniform
from secateur.budget import Budget
from secateur.errors import SpecError
from secateur.graph.types import Weight
from secateur.patterns import NM, Block, Pattern
from secateur.plan import Plan
from secateur.planning import Described
from secateur.train.scores import Scorer
from secateur.train.shards import Part, SharedGlobal, best_here, common_group, noise

Values = Callable[[str], Tensor]
"""What is here of a weight's values, by name."""

Means = Mapping[str, Mapping[str, Tensor]]
"""Statistics gathered from gradients, by weight and name."""


@dataclass(frozen=True, eq=False)
class Masks:
    """What masks of a pattern of single weights, blocks or N:M have to be like, and how they are chosen."""

    weights: Mapping[str, Weight]
    parts: Mapping[str, Part]
    pattern: Pattern
    strategy: Strategy
    whole: Whole
    scorer: Scorer
    described: Described

    def __post_init__(self) -> None:
        for name, part in self.parts.items():
            if part.group is not None and (why := _split_wrong(self.pattern, self.weights[name], part)):
                raise SpecError(f"pattern {self.pattern} cannot be chosen on {name!r}: {why}; use unstructured")
        if self.shared:
            self.scorer.require_splittable()
            if self.strategy not in (Global, Uniform, ErdosRenyi):
                raise SpecError("weights that processes share take allocate 'global', 'uniform' or 'erk'; use one")

    @property
    def shared(self) -> bool:
        return common_group(self.parts.values()) is not None

    @property
    def gathered(self) -> frozenset[str]:
        """What the criterion wants of the gradients of the steps since the last update."""
        return self.scorer.gathered

    def require_reachable(self, budget: Budget) -> None:
        """Raise BudgetError for a budget that no masks meet."""
        if not isinstance(self.pattern, NM):
            sizes = {n: self.units(n) for n in self.weights}
            equal = {n: torch.zeros(()).expand(size) for n, size in sizes.items()}
            counts(self.weights, self.whole, self.pattern, budget, equal, sizes, Uniform, {})

    def here(self, name: str) -> Weight:
        """The weight with the shape of what is here of it."""
        return replace(self.weights[name], shape=self.parts[name].local_shape)

    def units(self, name: str) -> int:
        """How many units the whole weight has."""
        weight = self.weights[name]
        outputs = weight.shape[weight.out_dim]
        if isinstance(self.pattern, Block):
            return math.ceil(outputs / self.pattern.rows) * math.ceil(weight.numel // outputs / self.pattern.cols)
        return weight.numel

    def noise(self, name: str, text: str, device: torch.device) -> Tensor:
        """Uniform numbers in [0, 1) from ``text``, one for each unit of a weight, on all of its elements here."""
        part, units = self.parts[name], self.units(name)
        flat = Part((units,), 0, units)
        if part.group is not None:
            first, rows = (n * units // part.shape[0] for n in (part.first, part.rows))
            flat = Part((units,), first, rows, part.group)
        return patterns.spread(self.pattern, noise(f"{text} {name}", flat, device), self.here(name))

    def choose(self, values: Values, budget: Budget, means: Means) -> dict[str, Tensor]:
        """Masks for a budget. Raises DataError for scores that are not finite, BudgetError where it cannot be met."""
        names = list(self.weights)
        scores = self.scorer.scores({n: values(n) for n in names}, means, names)
        return self.best(scores, budget)

    def best(self, scores: Mapping[str, Tensor], budget: Budget) -> dict[str, Tensor]:
        """Masks of the best scores, of the shapes of ``scores``; N:M before its final budget keeps more of every M."""
        if isinstance(self.pattern, NM):
            kept = max(self.pattern.n, math.ceil(self.pattern.m * (1 - budget.value)))
            if kept == self.pattern.m:
                return {name: torch.ones_like(s, dtype=torch.bool) for name, s in scores.items()}
            return {n: patterns.nm_mask(NM(kept, self.pattern.m), s, self.here(n)) for n, s in scores.items()}
        units = {n: patterns.pool(self.pattern, s, self.here(n)) for n, s in scores.items()}
        sizes = {n: self.units(n) for n in scores}
        fit = counts(self.weights, self.whole, self.pattern, budget, units, sizes, self._strategy(sizes), {})
        best = {n: best_here(u, fit[n], sizes[n], self.parts[n]) for n, u in units.items()}
        return {n: patterns.spread(self.pattern, flags, self.here(n)) for n, flags in best.items()}

    def plan(self, masks: Mapping[str, Tensor], method: str) -> Plan:
        """The plan of masks of whole weights."""
        pattern, budget, meta = self.described
        kept, total = {}, {}
        for name, mask in masks.items():
            weight, blocks = self.weights[name], isinstance(self.pattern, Block)
            flags = patterns.pool(self.pattern, mask.float(), weight) > 0 if blocks else mask
            kept[name], total[name] = int(flags.count_nonzero()), flags.numel()
        shapes = {name: weight.shape for name, weight in self.weights.items()}
        return Plan(
            pattern, budget, Allocation(kept, total), dict(masks), {}, {}, shapes, {**meta, "method": method},
            self.scorer.graph,
        )  # fmt: skip

    def _strategy(self, sizes: Mapping[str, int]) -> Strategy:
        if not self.shared:
            return self.strategy
        if self.strategy is Global:
            return lambda scores, relative: SharedGlobal(scores, {n: self.parts[n] for n in scores}, sizes)
        # Those two read nothing of the scores but how many there are.
        stand_in = {n: torch.empty(size, device="meta") for n, size in sizes.items()}
        if self.strategy is Uniform:
            return lambda scores, relative: Uniform(stand_in)
        return lambda scores, relative: ErdosRenyi(stand_in, shapes={n: [self.weights[n].shape] for n in stand_in})


def own_budget(pattern: NM) -> Budget:
    """What N:M removes."""
    return Budget("sparsity", Fraction(pattern.m - pattern.n, pattern.m), relative=True)


def _split_wrong(pattern: Pattern, weight: Weight, part: Part) -> str:
    if isinstance(pattern, NM) and weight.in_dim == 0:
        return "its inputs are split over processes"
    if isinstance(pattern, Block):
        if weight.out_dim != 0:
            return "its inputs are split over processes"
        if part.step % pattern.rows or weight.shape[0] % pattern.rows:
            return f"each process has {part.step} of its {weight.shape[0]} rows, which cuts blocks"
        if (weight.numel // weight.shape[0]) % pattern.cols:
            return "its inputs are no multiple of a block's"
    return ""
