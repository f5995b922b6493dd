"""Network slimming: batch-norm scales choose the channels."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.errors import SpecError
from secateur.patterns import Channel
from secateur.tasks import plain
from secateur.train import stages
from secateur.train.groups import Groups, strength_of
from secateur.train.pruner import Common, Pruner, final


class Slimming(Pruner):
    """L + strength * sum |gamma| over the batch-norm scales of free axes, then the budget's units go, and the rest
    trains on (Liu et al. 2017).

    The subgradient strength * sign(gamma) is added before each step up to ``end``. Units are chosen by criterion
    "bn_scale" where no other is given.

    strength: the paper has 1e-4 for VGG, 1e-5 for ResNets.
    end: the step after which units go; by default half of ``steps``, which the paper trains on for as long again.

    See ``Pruner`` for everything else; ``graph`` is needed. Raises SpecError for a model without batch norms on its
    free axes.
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
        common.setdefault("criterion", "bn_scale")
        last = stages.between(0, steps // 2 if end is None else end, 1, steps)[-1]
        self.strength = strength_of(strength)
        inner, graph = plain(model), common.get("graph")
        self.groups = Groups.of(inner, graph, common.get("ignore", ())).only(_scales(inner))
        if graph is not None and not self.groups.axes:
            raise SpecError(
                f"no free axis of this {type(inner).__name__} has a batch norm with a scale, and slimming draws those "
                "to zero; use GroupLasso or Proximal"
            )
        schedule = (stages.Stage(last, final(common["pattern"], budget)),)
        super().__init__(model, optimizer, budget, steps, schedule, **common)

    def _prepare(self) -> None:
        super()._prepare()
        if self.done == len(self.schedule):
            return
        with torch.no_grad():
            for place in (place for places in self.groups.axes.values() for place in places):
                scale = self.tensor(place.tensor)
                if scale.grad is not None:
                    ours = place.units.to(scale.device) >= 0
                    scale.grad.add_(scale.sign() * ours, alpha=self.strength)


def _scales(model: nn.Module) -> frozenset[str]:
    """The names of the scales of batch norms."""
    modules = model.named_modules(remove_duplicate=False)
    paths = [path for path, module in modules if isinstance(module, _BatchNorm) and module.affine]
    return frozenset(f"{path}.weight".lstrip(".") for path in paths)
