"""Group lasso: whole channels are drawn to zero together."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import nn

from secateur.patterns import Channel
from secateur.tasks import plain
from secateur.train import stages
from secateur.train.groups import Groups, strength_of
from secateur.train.pruner import Common, Pruner, final


class GroupLasso(Pruner):
    """L + strength * sum over units of sqrt(n_u) ||w_u||_2, then the budget's units go (Yuan and Lin 2006; Wen et al.
    2016), and the rest trains on.

    w_u are all trained weights of a unit, wherever it shows up: rows that make it, columns that read it, norms and
    biases; n_u says how many. The penalty's gradient, strength * sqrt(n_u) w_u / ||w_u||, and 0 for a unit that is
    zero, is added to the loss's before each step up to ``end``. Adam then divides it by the size of recent gradients;
    ``Proximal`` shrinks the weights themselves.

    end: the step after which units go, by the criterion; by default half of ``steps``.

    See ``Pruner`` for everything else; ``graph`` is needed.
    """

    allowed = (Channel,)
    why_only = "channels"

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
        common.setdefault("pattern", "channel")
        last = stages.between(0, steps // 2 if end is None else end, 1, steps)[-1]
        self.strength = strength_of(strength)
        self.groups = Groups.of(plain(model), common.get("graph"), common.get("ignore", ()))
        schedule = (stages.Stage(last, final(common["pattern"], budget)),)
        super().__init__(model, optimizer, budget, steps, schedule, **common)

    def _prepare(self) -> None:
        super()._prepare()
        if self.done == len(self.schedule):
            return
        with torch.no_grad():
            sizes, norms = self.groups.sizes(self.tensor), self.groups.norms(self.tensor)
            pulls = {a: torch.where(n > 0, self.strength * sizes[a].sqrt() / n, 0) for a, n in norms.items()}
            self.groups.pull(self.tensor, lambda name: self.tensor(name).grad, pulls)
