"""Learning rates that follow a pruning schedule."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.optim.lr_scheduler import LambdaLR

from secateur.errors import SpecError
from secateur.train.pruner import Pruner


def rewinding(optimizer: torch.optim.Optimizer, pruner: Pruner, floor: float = 0.1) -> LambdaLR:
    """The learning rate starts anew at every change of the masks, and falls in proportion to time to the next one.

    From the optimizer's rate to ``floor`` times that; after the last change down to the end of ``pruner.steps``. With
    ``Gradual`` it is what Kurtic et al. (2022) prune BERT with (8e-5 to 8e-6, 4 epochs a change). It depends on the
    step alone: load its state as any scheduler's. Call its ``step`` where the optimizer took a step.

    Raises SpecError for a floor outside 0 to 1.
    """
    if not 0 <= floor <= 1:
        raise SpecError(f"floor is {floor}; expected a part of the learning rate, from 0 to 1")
    steps = pruner.steps
    edges = [*sorted({0, *(stage.step for stage in pruner.schedule if stage.step < steps)}), steps]

    def factor(step: int) -> float:
        for start, end in pairwise(edges):
            if step < end:
                return 1 - (1 - floor) * (step - start) / (end - start)
        return floor

    return LambdaLR(optimizer, factor)
