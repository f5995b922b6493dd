"""Proximal steps: weights, blocks or channels become exactly zero while the network trains."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor, nn

from secateur import patterns
from secateur.patterns import Block, Channel, Unstructured
from secateur.tasks import plain
from secateur.train import stages
from secateur.train.choose import Masks
from secateur.train.groups import Groups, strength_of
from secateur.train.pruner import Common, Pruner, final
from secateur.train.shards import local


class Proximal(Pruner):
    """w_u <- w_u max(0, 1 - lr * strength * sqrt(n_u) / ||w_u||_2) after each step, then the budget's units go.

    The proximal map of strength * sum over units of sqrt(n_u) ||w_u|| (Parikh and Boyd 2014): unlike the penalty's
    gradient it makes weights exactly zero. A unit is a single weight (the map is soft thresholding), a block, or, with
    ``graph``, all n_u trained weights of a channel, wherever it shows up. A weight in the row of one channel and the
    column of another is multiplied by both factors; all norms are taken before. lr is the learning rate that the step
    was taken with, of the weight's own parameter group; what adaptive optimizers make of it does not count.

    After step ``end`` (half of ``steps`` by default) units go by the criterion until the budget is met; the rest trains
    on without a penalty.

    See ``Pruner`` for everything else. N:M groups have no such map.
    """

    allowed = (Unstructured, Block, Channel)
    why_only = "unstructured weights, blocks and channels"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        budget: str | None = None,
        steps: int = 0,
        *,
        strength: float = 1e-4,
        end: int | None = None,
        **common: Unpack[Common],
    ) -> None:
        steps = stages.number(steps)
        pattern = common.get("pattern", "unstructured")
        last = stages.between(0, steps // 2 if end is None else end, 1, steps)[-1]
        self.strength = strength_of(strength)
        on_axes = isinstance(patterns.parse(pattern), Channel)
        self.groups = Groups.of(plain(model), common.get("graph") if on_axes else None, common.get("ignore", ()))
        super().__init__(model, optimizer, budget, steps, (stages.Stage(last, final(pattern, budget)),), **common)

    def _after(self, optimizer: torch.optim.Optimizer, *given: Any) -> None:
        before = self.applied
        super()._after(optimizer, *given)
        if self.applied == before or self.done == len(self.schedule):
            return
        rates = {id(p): float(g["lr"]) * self.strength for g in self.optimizer.param_groups for p in g["params"]}
        with torch.no_grad():
            if isinstance(self.wish, Masks):
                for name in self.weights:
                    tensor = self.tensor(name)
                    self._shrink(name, local(tensor), rates[id(tensor)])
            else:
                self._shrink_channels(rates)

    def _shrink(self, name: str, weight: Tensor, rate: float) -> None:
        """Single weights or blocks of what is here of a weight."""
        if isinstance(self.pattern, Unstructured):
            weight.copy_(torch.nn.functional.softshrink(weight, rate))
            return
        assert isinstance(self.wish, Masks)
        here = self.wish.here(name)
        means = patterns.pool(self.pattern, weight.float().square(), here)  # ||w|| / sqrt(n) is their root
        factors = (1 - rate / means.sqrt().clamp_min(torch.finfo(means.dtype).tiny)).clamp_min(0)
        weight.mul_(patterns.spread(self.pattern, factors, here).to(weight))

    def _shrink_channels(self, rates: dict[int, float]) -> None:
        sizes, norms = self.groups.sizes(self.tensor), self.groups.norms(self.tensor)
        for axis, places in self.groups.axes.items():
            for place in places:
                weight = self.tensor(place.tensor)
                if (rate := rates.get(id(weight))) is not None:
                    tiny = torch.finfo(norms[axis].dtype).tiny
                    factors = (1 - rate * sizes[axis].sqrt() / norms[axis].clamp_min(tiny)).clamp_min(0)
                    weight.mul_(place.spread(factors, 1.0, weight))
