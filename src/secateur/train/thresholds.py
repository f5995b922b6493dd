"""STR: soft thresholds that are learned, one for each weight tensor."""

from __future__ import annotations

import math
from typing import Unpack

import torch
import torch.distributed as dist
from torch import Tensor, nn

from secateur.errors import SpecError
from secateur.patterns import Unstructured
from secateur.train import stages
from secateur.train.latent import Latent, require_own_scores
from secateur.train.pruner import Common, final
from secateur.train.shards import Part, total
from secateur.train.stages import Stage

THRESHOLD, SHRINK = "threshold", "shrink"


class STR(Latent):
    """Soft threshold reparameterization (Kusupati et al. 2020), which finds how much each weight tensor keeps.

        w' = sign(w) relu(|w| - sigmoid(s)),   one s for each weight tensor
        dL/dw = dL/dw' 1[w' != 0],   dL/ds = - sigmoid'(s) sum of dL/dw' sign(w')
        w <- optimizer(dL/dw),   s <- shrink s - rate dL/ds

    What is below the threshold is zero, decays, and does not return but by a lower threshold. In the paper the weight
    decay on s, ``shrink = 1 - rate decay``, says how much goes in the end, which takes trials to find. Here the budget
    says it, in two ways: by default s shrinks so that, had it no gradient, it would arrive at ``end`` where the budget
    cuts the weights as they are after the first step; and at ``end`` masks of exactly the budget keep the largest
    ``|w| - sigmoid(s)``, and are fixed. Those are the weights that are not zero, and where these are too few, those
    that come next, which train on from zero. ``sparsity`` says before that what the thresholds alone remove.

    initial: s at first, in all weight tensors; by default 5 less than where the budget cuts, which is 0.7 % of that
        threshold. The paper has -3200 for ResNet-50.
    rate: the step of s; by default the learning rate that the optimizer has for the weight at that moment, as there.
    decay: the weight decay of s, instead of what follows from the budget. The paper has 2.25e-5, under momentum.
    end: the step that fixes the masks; by default 3/4 of ``steps``.

    Unstructured only: thresholds are those of single weights. Steps whose gradients are NaN or infinite anywhere do not
    count for s. See ``Latent`` and ``Pruner`` for everything else. Raises SpecError for a criterion, as ``|w|`` is it.
    """

    allowed = (Unstructured,)
    why_only = "unstructured weights, each against the threshold"
    from_start = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        budget: str | None = None,
        steps: int = 0,
        *,
        initial: float | None = None,
        rate: float | None = None,
        decay: float | None = None,
        end: int | None = None,
        **common: Unpack[Common],
    ) -> None:
        steps = stages.number(steps)
        require_own_scores("STR", common)
        last = steps * 3 // 4 if end is None else end
        stages.between(last, last, 1, steps)
        for name, value in (("rate", rate), ("decay", decay)):
            if value is not None and not 0 <= value < math.inf:
                raise SpecError(f"{name} is {value}; expected 0 or more")
        if initial is not None and not (math.isfinite(initial) and initial < 0):
            raise SpecError(f"initial is {initial}; expected less than 0, a threshold below 1/2")
        wish = final(common.get("pattern", "unstructured"), budget)
        super().__init__(model, optimizer, budget, steps, (Stage(last, wish),), **common)
        self.initial, self.rate, self.decay = initial, rate, decay

    def project(self, name: str, latent: Tensor) -> Tensor:
        if THRESHOLD not in self.state[name]:
            self._aim()
        return latent.sign() * torch.relu(latent.abs() - self.threshold(name).to(latent.dtype))

    def threshold(self, name: str) -> Tensor:
        """What the magnitudes of a weight tensor lose now (0-dimensional, float32)."""
        return self.state[name][THRESHOLD].sigmoid()

    def pull(self, name: str, latent: Tensor, grad: Tensor) -> None:
        state = self.state[name]
        if THRESHOLD not in state:
            return
        cut = self.threshold(name)
        grad.masked_fill_(latent.abs() <= cut.to(latent.dtype), 0)
        if self.learning:
            along = total((grad.float() * latent.sign().float()).sum(), self.parts[name].group)
            rate = self._rate(name) if self.rate is None else self.rate
            shrink = state[SHRINK] if self.decay is None else 1 - rate * self.decay
            state[THRESHOLD] = shrink * state[THRESHOLD] + rate * along * cut * (1 - cut)

    def score(self, name: str) -> Tensor:
        latent = self.value(name).float().abs()
        return latent - self.threshold(name) if THRESHOLD in self.state[name] else latent

    def lasting(self, name: str, latent: Tensor) -> Tensor:
        return self.project(name, latent)

    def _aim(self) -> None:
        """Thresholds, and how they shrink, from the weights as they are now."""
        sizes = {name: torch.nan_to_num(self.value(name).float().abs()) for name in self.weights}
        masks = self.masks.best(sizes, self.budget)
        for name, here in sizes.items():
            cut = _largest(here.masked_fill(masks[name], 0), self.parts[name]).double().clamp(1e-12, 0.475)
            goal = torch.logit(cut).float()
            first = goal - 5 if self.initial is None else torch.full_like(goal, self.initial)
            steps = max(1, self.schedule[-1].step - 1)
            self.state[name][THRESHOLD] = first
            self.state[name][SHRINK] = (goal / first) ** (1 / steps)

    def _rate(self, name: str) -> float:
        """The learning rate of a weight."""
        tensor = self.tensor(name)
        return next(float(g["lr"]) for g in self.optimizer.param_groups if any(p is tensor for p in g["params"]))


def _largest(here: Tensor, part: Part) -> Tensor:
    """The largest of everyone's elements, none below 0."""
    largest = here.max() if here.numel() else here.new_zeros(())
    if part.group is None:
        return largest
    everyone = here.new_zeros(dist.get_world_size(part.group))
    everyone[dist.get_rank(part.group)] = largest
    return total(everyone, part.group).max()
