"""Growing regularization: what shall go is drawn to zero ever more strongly, and goes when it hardly matters."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import nn

from secateur.errors import SpecError
from secateur.patterns import Channel
from secateur.tasks import plain
from secateur.train import stages
from secateur.train.channels import Channels
from secateur.train.groups import Groups, strength_of
from secateur.train.pruner import Common, Pruner, final
from secateur.train.stages import Stage


class GrowingReg(Pruner):
    """GReg-1: units are chosen first, then their L2 penalty grows until they go (Wang et al. 2021).

    After step ``begin`` the criterion chooses what stays within the budget (``step()`` is True, though nothing is
    masked yet). From then on lambda * w is added to the gradients of all weights of the other units; lambda grows by
    ``delta`` every ``every`` steps, up to ``ceiling``. After step ``end`` they go, and the rest trains on. A weight in
    a row and a column that both go is drawn by both.

    every: the paper has 5 steps on ImageNet, 10 on CIFAR.
    delta: 1e-4 in the paper, for 100,000 steps; by default so much that ``ceiling`` is reached after 5/9 of the way
        from ``begin`` to ``end``, and held for the rest of it, as there.
    begin, end: 0 and half of ``steps`` by default.
    everything: GReg-2: before ``begin`` the penalty of all units grows to this (1e-2 in the paper), which tells weights
        apart by how the loss holds on to them.

    The optimizer multiplies the penalty by its learning rate: beyond ceiling * lr = 1 weights swing instead of
    shrinking. See ``Pruner`` for everything else; ``graph`` is needed.
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
        begin: int = 0,
        end: int | None = None,
        every: int = 5,
        delta: float | None = None,
        ceiling: float = 1.0,
        everything: float = 0.0,
        **common: Unpack[Common],
    ) -> None:
        steps = stages.number(steps)
        common.setdefault("pattern", "channel")
        last = steps // 2 if end is None else end
        stages.between(begin, last, every, steps)
        if begin == last:
            raise SpecError(f"units are chosen and removed after step {last}; expected begin < end, for the penalty")
        self.every, self.ceiling = every, strength_of(ceiling, "ceiling")
        grown = max(1, (last - begin) * 5 // 9 // every)
        self.delta = self.ceiling / grown if delta is None else strength_of(delta, "delta")
        self.everything = strength_of(everything, "everything")
        self.groups = Groups.of(plain(model), common.get("graph"), common.get("ignore", ()))
        wish = final(common["pattern"], budget)
        super().__init__(model, optimizer, budget, steps, (Stage(begin, wish), Stage(last, wish)), **common)

    def penalty(self) -> float:
        """Lambda of the next step: before the choice that of all units, then that of those that go."""
        begin = self.schedule[0].step
        if self.done:
            return min(self.ceiling, self.delta * ((self.applied - begin) // self.every + 1))
        return self.everything * min(1.0, (self.applied // self.every + 1) / max(1, begin // self.every))

    def change(self, stage: Stage) -> None:
        assert isinstance(self.wish, Channels)
        assert stage.budget is not None
        if not self.done:
            self.wish.choose(self.value, stage.budget, {})
        if stage is self.schedule[-1]:
            self.set_masks(self.wish.masks())

    def _prepare(self) -> None:
        super()._prepare()
        if self.done == len(self.schedule) or not (penalty := self.penalty()):
            return
        assert isinstance(self.wish, Channels)
        kept = self.wish.kept
        counts = {axis: len(places[0].indices) for axis, places in self.groups.axes.items() if places}
        with torch.no_grad():
            pulls = {
                axis: penalty * (~kept.units[axis]).float() if kept is not None else torch.full((count,), penalty)
                for axis, count in counts.items()
            }
            self.groups.pull(self.tensor, lambda name: self.tensor(name).grad, pulls)
