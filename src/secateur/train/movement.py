"""Movement pruning: what moves away from zero stays."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Unpack

import torch
from torch import Tensor, nn

from secateur.errors import DataError, SpecError
from secateur.train import stages
from secateur.train.bits import keep_
from secateur.train.latent import LATENT, Latent, adam_, require_own_scores, risen
from secateur.train.pruner import Common, final
from secateur.train.stages import Stage

SCORES = "scores"


class Movement(Latent):
    """Movement pruning with a budget (Sanh et al. 2020), for fine-tuning a network that is trained already.

        w' = m w, m of the best of S, anew with every step
        S <- S - rate w dL/dw',   from 0
        w <- optimizer(m dL/dw')

    What is masked keeps its value, and returns with it. A block's score is the mean of its elements' (block movement,
    Lagunas et al. 2021). Steps whose gradients are NaN or infinite anywhere do not count for scores.

    rate: the paper's 1e-2. It scales all scores alike, and so changes no mask. The authors' code takes the steps of S
        with Adam, ``SoftMovement`` does so, too; this is the equation.
    begin, end: the first masks, and the step that fixes them, along a cubic curve; by default a tenth and 8 tenths of
        ``steps``, as the paper's first and last epochs of ten.
    every: steps between two budgets of the curve; by default a 64th of ``steps``.
    schedule: budgets of one's own instead, (step, budget) pairs such as (100, "sparsity=50%"), the last one ``budget``.

    See ``Latent`` and ``Pruner`` for everything else. Raises SpecError for a schedule that ends before it begins, and
    for a criterion: scores are learned.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        budget: str | None = None,
        steps: int = 0,
        *,
        rate: float = 1e-2,
        begin: int | None = None,
        end: int | None = None,
        every: int | None = None,
        schedule: Iterable[tuple[int, str | None]] | None = None,
        **common: Unpack[Common],
    ) -> None:
        steps = stages.number(steps)
        require_own_scores("Movement", common)
        wish = final(common.get("pattern", "unstructured"), budget)
        if not 0 < rate < float("inf"):
            raise SpecError(f"rate is {rate}; expected more than 0, such as 1e-2")
        if schedule is not None:
            chosen = stages.given(schedule, steps, wish)
        else:
            first = steps // 10 if begin is None else begin
            last = max(first, steps * 8 // 10) if end is None else end
            chosen = tuple(stages.cubic(wish, first, last, every or max(1, steps // 64), steps))
        super().__init__(model, optimizer, budget, steps, chosen, **common)
        self.rate = rate

    def pull(self, name: str, latent: Tensor, grad: Tensor) -> None:
        if self.learning:
            scores = self.state[name].setdefault(SCORES, torch.zeros_like(grad, dtype=torch.float32))
            scores.addcmul_(latent.float(), grad.float(), value=-self.rate)
        if (mask := self.mask(name)) is not None:
            keep_(grad, mask)

    def score(self, name: str) -> Tensor:
        return seen(self.state[name], name)


class SoftMovement(Latent):
    """Movement pruning with a threshold (Sanh et al. 2020), which finds how much each weight tensor keeps.

        w' = m w, m = 1[sigmoid(S) > t], anew with every step
        S <- Adam(w dL/dw' + d/dS l mean sigmoid(S)),   from 0
        w <- optimizer(m dL/dw')

    The mean is that of the weight tensors' means. The threshold t and the penalty l rise from 0 to their final values
    along a cubic curve from ``begin`` to ``end``. How much they remove depends on the network and on ``penalty``; the
    budget is made to hold at ``end``, where masks of exactly the budget are made of the best S, and fixed. ``sparsity``
    says before that what the threshold alone removes: choose ``penalty`` so that it comes close. A unit that the
    threshold had removed, and the budget lets stay, has its weights back.

    All elements of a block have one score. With N:M the threshold acts on elements, and N:M holds from ``end`` on.
    Steps whose gradients are NaN or infinite anywhere do not count for scores.

    penalty, threshold, rate: the paper's 400, 0.1 and (Adam's) 1e-2.
    begin, end: by default a tenth and 8 tenths of ``steps``, as the paper's first and last epochs of ten.

    See ``Latent`` and ``Pruner`` for everything else. Raises SpecError as ``Movement`` does.
    """

    from_start = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        budget: str | None = None,
        steps: int = 0,
        *,
        penalty: float = 400.0,
        threshold: float = 0.1,
        rate: float = 1e-2,
        begin: int | None = None,
        end: int | None = None,
        **common: Unpack[Common],
    ) -> None:
        steps = stages.number(steps)
        require_own_scores("SoftMovement", common)
        wish = final(common.get("pattern", "unstructured"), budget)
        if not (0 <= penalty < float("inf") and 0 < threshold < 0.5 and 0 < rate < float("inf")):
            raise SpecError(
                f"penalty is {penalty}, threshold {threshold} and rate {rate}; expected 0 or more, a part below 0.5, "
                "where all scores begin, and more than 0"
            )
        first = steps // 10 if begin is None else begin
        last = max(first, steps * 8 // 10) if end is None else end
        stages.between(first, last, 1, steps)
        super().__init__(model, optimizer, budget, steps, (Stage(last, wish),), **common)
        self.penalty, self.threshold, self.rate, self.begin = penalty, threshold, rate, first

    def project(self, name: str, latent: Tensor) -> Tensor:
        here = latent.clone()
        keep_(here, self.open(name, latent))
        return here

    def open(self, name: str, latent: Tensor) -> Tensor:
        """Which elements are over the threshold now."""
        scores = self.state[name].get(SCORES)
        if scores is None:
            return torch.ones_like(latent, dtype=torch.bool)
        return scores.sigmoid() > self.threshold * risen(self.applied, self.begin, self.schedule[-1].step)

    def pull(self, name: str, latent: Tensor, grad: Tensor) -> None:
        mask = self.open(name, latent) if LATENT in self.state[name] else None
        if self.learning:
            state = self.state[name]
            scores = state.setdefault(SCORES, torch.zeros_like(grad, dtype=torch.float32))
            force = self.penalty * risen(self.applied, self.begin, self.schedule[-1].step)
            gate = scores.sigmoid()
            slope = gate.mul(1 - gate).mul_(force / (self.weights[name].numel * len(self.weights)))
            whole = self.per_unit(name, (latent.float() * grad.float()).add_(slope))
            adam_(scores, whole, state, self.rate, self.applied + 1)
        if mask is not None:
            keep_(grad, mask)

    def score(self, name: str) -> Tensor:
        return seen(self.state[name], name)


def seen(state: dict[str, Tensor], name: str) -> Tensor:
    """The scores that were learned. Raises DataError where none were."""
    if SCORES not in state:
        raise DataError(f"no finite gradient of {name!r} was seen yet, from which scores are learned")
    return state[SCORES]
