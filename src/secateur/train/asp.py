"""Pruning once, and training on."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import nn

from secateur.errors import SpecError
from secateur.train import stages
from secateur.train.choose import Masks
from secateur.train.pruner import Common, final
from secateur.train.sparse import SparseStart
from secateur.train.stages import Stage


class ASP(SparseStart):
    """Magnitudes choose once, and masks stay for good (Mishra et al. 2021, for 2:4).

    The recipe: train dense; prune; repeat the training with all of its schedule, from its first learning rate, on what
    is left. This prunes when it is made, and holds the zeros through the repetition.

    at: the step after which weights go, in training that begins dense; by default 0, at once.
    pattern: by default "2:4". For others a budget is needed.

    See ``Pruner`` for everything else. Raises SpecError for a step that is none of ``steps``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        budget: str | None = None,
        steps: int = 0,
        *,
        at: int = 0,
        **common: Unpack[Common],
    ) -> None:
        steps = stages.number(steps)
        if not 0 <= at <= steps:
            raise SpecError(f"weights go after step {at} of {steps}; expected 0 <= at <= steps")
        wish = final(common.setdefault("pattern", "2:4"), budget)
        super().__init__(model, optimizer, budget, steps, [Stage(at, wish)], **common)
        if at == 0:
            self.require_scores_now()
            assert isinstance(self.wish, Masks)
            with torch.no_grad():
                self.start_with(self.wish.best(self.scored(), wish))
