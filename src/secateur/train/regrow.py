"""Drop and grow: what the dynamic methods share, a constant budget whose weights move to better places."""

from __future__ import annotations

import math
from typing import Literal, Unpack

import torch
from torch import Tensor, nn

from secateur import patterns
from secateur.errors import SpecError
from secateur.patterns import NM
from secateur.train import averages, stages
from secateur.train.choose import Masks
from secateur.train.pruner import Common, final
from secateur.train.shards import Part, best_here, total
from secateur.train.sparse import SparseStart
from secateur.train.stages import Stage

Start = Literal["random", "magnitude"]


class DropAndGrow(SparseStart):
    """Every ``every`` steps a part of what is left of each weight goes, and as much of it comes back elsewhere.

    start: "random" for a network that is trained from scratch, "magnitude" for one that is trained already: what its
        criterion says matters most. How much each weight keeps, ``allocate`` says; by default "erk".
    fraction: the part a of what is left that is exchanged at first; after step t it is a / 2 (1 + cos(pi t / end)).
    every, end: steps between two exchanges, and the step before which the last one is; by default 3/4 of ``steps``.

    What grows is zero at first. The optimizer forgets what it remembered of it, but for Adam's second moment, which
    becomes the mean of the others': from zero, the first update would be 3 times the learning rate.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        budget: str | None = None,
        steps: int = 0,
        *,
        start: Start = "random",
        fraction: float = 0.3,
        every: int = 100,
        end: int | None = None,
        **common: Unpack[Common],
    ) -> None:
        steps = stages.number(steps)
        last = steps * 3 // 4 if end is None else end
        if not 0 < fraction < 1:
            raise SpecError(f"fraction is {fraction}; expected the part that is exchanged, between 0 and 1")
        if start not in ("random", "magnitude"):
            raise SpecError(f"start is {start!r}; expected random, from scratch, or magnitude, for a trained network")
        if not 0 < every < last <= steps:
            raise SpecError(
                f"weights are exchanged every {every} steps before step {last} of {steps}, so never; expected "
                "0 < every < end <= steps"
            )
        wish = final(common.get("pattern", "unstructured"), budget)
        common.setdefault("allocate", "erk")
        super().__init__(model, optimizer, budget, steps, [Stage(at, wish) for at in range(0, last, every)], **common)
        self.fraction, self.end = fraction, last
        if start == "magnitude":
            self.require_scores_now()
        assert isinstance(self.wish, Masks)
        with torch.no_grad():
            scores = self.scored() if start == "magnitude" else {n: self.random(n, "start") for n in self.weights}
            self.start_with(self.wish.best(scores, wish))

    def growth(self, name: str, stage: Stage) -> Tensor | None:
        """What is here of how much each element should grow, 0 or more; None leaves the weight's mask as it is."""
        raise NotImplementedError

    def share(self, step: int) -> float:
        """The part of what is left that is exchanged after a step."""
        return self.fraction / 2 * (1 + math.cos(math.pi * step / self.end))

    def change(self, stage: Stage) -> None:
        scores = self.scored()
        growth = {name: self.growth(name, stage) for name in self.weights}
        old = {name: self._kept(name) for name in self.weights}
        new = {
            name: old[name] if grow is None else self._exchanged(name, old[name], scores[name], grow, stage)
            for name, grow in growth.items()
        }
        self.set_masks(new)
        for name, mask in new.items():
            grown, stayed = mask & ~old[name], mask & old[name]  # what was masked has no moments: they are all zero
            averages.level_moments(self.optimizer, self.tensor(name), grown, stayed, self.parts[name].group)

    def random(self, name: str, moment: str) -> Tensor:
        """Uniform numbers in [0, 1), one for each unit, on all of its elements that are here."""
        assert isinstance(self.wish, Masks)
        return self.wish.noise(name, f"{self.seed} {moment}", self.value(name).device)

    def _exchanged(self, name: str, old: Tensor, scores: Tensor, growth: Tensor, stage: Stage) -> Tensor:
        """The mask of what is here of a weight after an exchange."""
        assert isinstance(self.wish, Masks)
        here, part, size, share = self.wish.here(name), self.parts[name], self.wish.units(name), self.share(stage.step)
        growth = growth.to(scores.dtype)
        if isinstance(self.pattern, NM):  # what a group loses, it gets back; tails of groups stay as they are
            kept, _ = _dropped(old.flatten(), scores.flatten(), share, size, part)
            return patterns.nm_mask(self.pattern, growth.masked_fill(kept.view(old.shape), math.inf), here)
        active, low, high = (patterns.pool(self.pattern, x, here) for x in (old.to(scores.dtype), scores, growth))
        sizes = patterns.edge_sizes(self.pattern, here)
        if sizes is None:
            return patterns.spread(self.pattern, _swapped(active > 0, low, high, share, size, part), here)
        units = torch.zeros_like(active, dtype=torch.bool)
        for elements in sorted(set(sizes.tolist())):  # edge blocks are smaller; equals for equals fits the budget
            at = (sizes == elements).to(active.device)
            units[at] = _swapped(active[at] > 0, low[at], high[at], share, int(at.sum()), part)
        return patterns.spread(self.pattern, units, here)


def _dropped(active: Tensor, scores: Tensor, share: float, size: int, part: Part) -> tuple[Tensor, int]:
    """Which of the active units stay, and how many, over all processes, do not: ``share`` of them, rounded down."""
    count = int(total(active.sum(), part.group))
    leave = int(share * count)
    return best_here(scores.masked_fill(~active, -math.inf), count - leave, size, part), leave


def _swapped(active: Tensor, scores: Tensor, growth: Tensor, share: float, size: int, part: Part) -> Tensor:
    """Flat flags of units after the worst of the active ones went and the best of all that did not stay came."""
    kept, leave = _dropped(active, scores, share, size, part)
    return kept | best_here(growth.masked_fill(kept, -math.inf), leave, size, part)
