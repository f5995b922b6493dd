"""SR-STE: a mask that is made anew with every step, and gradients that pass straight through it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Unpack

import torch
from torch import Tensor, nn

from secateur import patterns
from secateur.criteria import resolve
from secateur.errors import SpecError
from secateur.patterns import NM
from secateur.train import stages
from secateur.train.bits import keep_
from secateur.train.latent import Latent
from secateur.train.pruner import Common, final
from secateur.train.scores import GATHERED
from secateur.train.stages import Stage


class SRSTE(Latent):
    """The sparse-refined straight-through estimator (Zhou et al. 2021), made for N:M from scratch.

        w' = m w, m of the best of w, anew with every step
        w <- optimizer(dL/dw' + decay (1 - m) w)

    What is masked is trained on and can return; ``decay`` draws it to zero, so that masks come to rest. With
    ``decay=0`` this is the plain straight-through estimator, which loses to masked training on ResNet-50 and wins on
    transformers that are trained long or from scratch (JaxPruner, Lee et al. 2023).

    decay: the paper's 2e-4.
    begin, full, end: the first masks; the step from which the budget holds, along a cubic curve from ``begin`` on; the
        step that fixes the masks. By default 0, at once for N:M and half of ``steps`` for others, and ``steps``.
    every: steps between two budgets of the curve; by default a 64th of ``steps``.
    schedule: budgets of one's own instead, (step, budget) pairs such as (100, "sparsity=50%"), the last one ``budget``;
        the last step fixes the masks.

    See ``Latent`` and ``Pruner`` for everything else. ``criterion`` says what is best; criteria that need data are
    refused, as every step would ask for them. Raises SpecError for a schedule that ends before it begins.
    """

    learns = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        budget: str | None = None,
        steps: int = 0,
        *,
        decay: float = 2e-4,
        begin: int = 0,
        full: int | None = None,
        end: int | None = None,
        every: int | None = None,
        schedule: Iterable[tuple[int, str | None]] | None = None,
        **common: Unpack[Common],
    ) -> None:
        steps = stages.number(steps)
        pattern, criterion = common.get("pattern", "unstructured"), common.get("criterion", "magnitude")
        wish = final(pattern, budget)
        if not 0 <= decay < float("inf"):
            raise SpecError(f"decay is {decay}; expected 0 or more, such as 2e-4")
        if far := frozenset(getattr(resolve(criterion), "needs", ())) - GATHERED.keys():
            raise SpecError(f"criterion {criterion!r} asks for {min(far)!r} with every step; use magnitude or taylor")
        if schedule is not None:
            chosen = stages.given(schedule, steps, wish)
        else:
            last = steps if end is None else end
            at_once = isinstance(patterns.parse(pattern), NM)
            whole = (begin if at_once else max(begin, last // 2)) if full is None else full
            stages.between(whole, last, 1, steps)
            curve = tuple(stages.cubic(wish, begin, whole, every or max(1, steps // 64), steps))
            chosen = (*curve, Stage(last, wish)) if last > whole else curve
        super().__init__(model, optimizer, budget, steps, chosen, **common)
        self.decay = decay

    def pull(self, name: str, latent: Tensor, grad: Tensor) -> None:
        if (mask := self.mask(name)) is None or not self.decay:
            return
        gone = latent.clone()
        keep_(gone, ~mask)
        grad.add_(gone, alpha=self.decay)

    def choose(self, stage: Stage) -> dict[str, Tensor]:
        assert stage.budget is not None
        return self.masks.choose(self.value, stage.budget, self._means())
