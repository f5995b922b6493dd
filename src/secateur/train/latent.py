"""What methods share whose network computes with other weights than those that are trained.

A parameter holds the effective weights w', which is what any forward pass, copy, average or checkpoint meets, and so
its gradient is dL/dw'. The latent weights w are here, and are in the parameter only while the optimizer takes its step:
it has their gradients then, its weight decay and its moments are those of w.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from secateur import patterns
from secateur.errors import DataError, SpecError
from secateur.patterns import Block
from secateur.train.bits import keep_, pack
from secateur.train.choose import Masks
from secateur.train.pruner import Common, Pruner
from secateur.train.shards import finite_everywhere, local, total
from secateur.train.stages import Stage

LATENT = "latent"


class Latent(Pruner):
    """Trains weights behind those that the network computes with, until the last stage of the schedule.

    Between two stages masks are made anew after every step. The last stage fixes them: what stays, stays as the network
    knows it, the latent weights are let go of, and the rest of the training is masked, as with ``Gradual``. The first
    step is dense: nothing is done to a model before its optimizer has taken one.

    What is written to a pruned weight between two steps is lost unless it is the optimizer that writes it.
    """

    from_start: ClassVar[bool] = False
    """Whether there are latent weights from the first step on, or from the first masks."""
    learns: ClassVar[bool] = True
    """Whether something besides the weights is learned from gradients."""
    learning = False
    """Whether the gradients of the step that is being taken are finite: nothing else is learned from."""

    # --- what methods say --------------------------------------------------------------------------

    def project(self, name: str, latent: Tensor) -> Tensor:
        """What the network computes with: here the latent weights under the mask."""
        here = latent.clone()
        if (mask := self.mask(name)) is not None:
            keep_(here, mask)
        return here

    def pull(self, name: str, latent: Tensor, grad: Tensor) -> None:
        """Make dL/dw' that of the latent weights, in place, and learn from it what else there is to learn."""

    def score(self, name: str) -> Tensor:
        """How much each element that is here matters (float32), for masks. Raises DataError where that is not known."""
        raise NotImplementedError

    def lasting(self, name: str, latent: Tensor) -> Tensor:
        """What is left of latent weights that stay, once masks are fixed."""
        return latent

    # --- the step ----------------------------------------------------------------------------------

    def before(self, name: str, weight: Tensor, grad: Tensor | None) -> None:
        if self.fixed or name not in self.state:
            super().before(name, weight, grad)
            return
        latent = self.state[name].get(LATENT)
        if grad is not None:
            self.pull(name, weight if latent is None else latent, grad)
        if latent is not None:
            weight.copy_(latent)

    def after(self, name: str, weight: Tensor) -> None:
        if self.from_start and not self.fixed:
            self.hold(name, weight)
        if (latent := self.state.get(name, {}).get(LATENT)) is None:
            super().after(name, weight)
            return
        latent.copy_(weight)
        weight.copy_(self.project(name, latent))

    def step(self) -> bool:
        """See ``Pruner.step``. True with every step once masks are made anew with each."""
        made, fresh = self.done, self.applied != self._seen
        due = made < len(self.schedule) and self.schedule[made].step <= self.applied
        changed = super().step()
        if due or not fresh or not made or self.fixed:
            return changed
        try:
            with torch.no_grad():
                self.change(self.schedule[made - 1])
        except DataError as error:
            warnings.warn(f"after step {self.applied} masks stay as they are: {error}", stacklevel=2)
            return False
        self._mask_average()
        return True

    def change(self, stage: Stage) -> None:
        masks = {} if stage.budget is None else self.choose(stage)
        if stage is self.schedule[-1]:
            self.fix(masks)
        else:
            self.wear(masks)

    def choose(self, stage: Stage) -> dict[str, Tensor]:
        """Masks for a stage, of the best scores. Raises DataError, in every process, where these are not finite."""
        scores = {name: self.score(name) for name in self.weights}
        finite = finite_everywhere(scores.values(), self.group)
        for name, good in zip(scores, finite, strict=True):
            if not good:
                raise DataError(f"the scores of {name!r} are not finite; look at the loss and the learning rate")
        assert stage.budget is not None
        return self.masks.best(scores, stage.budget)

    def mask_gradients(self) -> None:
        """As ``Pruner.mask_gradients`` once masks are fixed; until then all of every gradient is used."""
        if self.fixed:
            super().mask_gradients()

    @property
    def sparsity(self) -> float:
        """The part of the weights' elements, over all processes, that are zero for the network now."""
        if not any(LATENT in kept for kept in self.state.values()):
            return super().sparsity
        gone = [total((local(self.tensor(n)) == 0).sum(), self.parts[n].group) for n in self.weights]
        return sum(map(int, gone)) / float(sum(weight.numel for weight in self.weights.values()))

    # --- for methods -------------------------------------------------------------------------------

    @property
    def fixed(self) -> bool:
        """Whether masks change no more."""
        return self.done == len(self.schedule)

    @property
    def masks(self) -> Masks:
        assert isinstance(self.wish, Masks)
        return self.wish

    def value(self, name: str) -> Tensor:
        return self.state[name].get(LATENT, super().value(name))

    def hold(self, name: str, weight: Tensor) -> None:
        """Have latent weights, those that are there, where there are none yet."""
        if name in self.state and LATENT not in self.state[name]:
            self.state[name][LATENT] = weight.clone()

    def wear(self, masks: Mapping[str, Tensor]) -> None:
        """Let the network compute with what these masks keep of the latent weights."""
        self.bits = {name: pack(mask) for name, mask in masks.items()}
        for name in self.weights:
            self.hold(name, self.value(name))
        self.show()

    def fix(self, masks: Mapping[str, Tensor]) -> None:
        """Let these be the masks from now on, and forget latent weights and all that was learned of them."""
        for name in self.weights:
            if (latent := self.state[name].get(LATENT)) is not None:
                local(self.tensor(name)).detach().copy_(self.lasting(name, latent))
        self.state = {name: {} for name in self.weights}
        self.set_masks(masks)

    def restored(self) -> None:
        self.show()

    def show(self) -> None:
        """Write into the parameters what the network computes with, wherever there are latent weights."""
        for name, kept in self.state.items():
            if LATENT in kept:
                local(self.tensor(name)).detach().copy_(self.project(name, kept[LATENT]))

    def per_unit(self, name: str, values: Tensor) -> Tensor:
        """On each element that is here, the sum over the elements of its unit."""
        if not isinstance(self.pattern, Block):
            return values
        here = self.masks.here(name)
        sizes = patterns.edge_sizes(self.pattern, here)
        means = patterns.pool(self.pattern, values, here)
        sums = means * (patterns.unit_size(self.pattern) if sizes is None else sizes.to(means))
        return patterns.spread(self.pattern, sums, here)

    def _prepare(self) -> None:
        if self.learns and not self.fixed:
            grads = [grad for _, _, grad in self.live() if grad is not None]
            self.learning = bool(grads) and all(finite_everywhere(grads, self.group))
        super()._prepare()


def require_own_scores(method: str, common: Common) -> None:
    """Raise SpecError where a criterion is given to a method that learns its scores."""
    if common.get("criterion", "magnitude") != "magnitude":
        raise SpecError(f"{method} learns what matters, and takes no criterion; leave criterion= out")


def risen(step: int, begin: int, end: int) -> float:
    """How far a cubic curve from 0 (up to ``begin``) to 1 (at ``end``) has risen."""
    done = min(1.0, max(0.0, (step - begin) / max(1, end - begin)))
    return 1 - (1 - done) ** 3


def adam_(value: Tensor, grad: Tensor, state: dict[str, Tensor], rate: float, step: int) -> None:
    """Step number ``step`` (from 1) of Adam (Kingma and Ba 2015) with its usual constants; moments are in ``state``."""
    mean = state.setdefault("mean", torch.zeros_like(value)).lerp_(grad, 0.1)
    square = state.setdefault("square", torch.zeros_like(value)).mul_(0.999).addcmul_(grad, grad, value=0.001)
    scale = (square / (1 - 0.999**step)).sqrt_().add_(1e-8)
    value.addcdiv_(mean, scale, value=-rate / (1 - 0.9**step))
