"""Gradual magnitude pruning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Unpack

import torch
from torch import nn

from secateur.patterns import NM, Block, Channel, Unstructured
from secateur.train import stages
from secateur.train.pruner import Common, Pruner, final


class Gradual(Pruner):
    """More and more is removed along a cubic curve, then the rest trains on (Zhu and Gupta 2017).

    What has gone is zero and does not come back where the criterion is a magnitude: zeros score lowest.

    begin, end: the first and last step that removes something. By default a quarter of ``steps``, and what the grid of
        Gale et al. (2019) found best: 78 % of ``steps`` for up to 80 % sparsity, 60 % for 90 %, 53 % from 95 % on.
        For a network that is trained already, begin=0.
    every: steps between two updates; by default a 64th of ``steps``.
    schedule: updates of one's own instead, (step, budget) pairs such as (100, "sparsity=50%"), the last one ``budget``.

    See ``Pruner`` for everything else. Raises SpecError for a schedule that ends before it begins.
    """

    allowed = (Unstructured, Block, NM, Channel)
    why_only = "unstructured weights, blocks, N:M and channels"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        budget: str | None = None,
        steps: int = 0,
        *,
        begin: int | None = None,
        end: int | None = None,
        every: int | None = None,
        schedule: Iterable[tuple[int, str | None]] | None = None,
        **common: Unpack[Common],
    ) -> None:
        steps = stages.number(steps)
        wish = final(common.get("pattern", "unstructured"), budget)
        if schedule is not None:
            chosen = stages.given(schedule, steps, wish)
        else:
            first = steps // 4 if begin is None else begin
            last = max(first, int(_end(float(wish.removed)) * steps)) if end is None else end
            gap = max(1, steps // 64) if every is None else every
            chosen = tuple(stages.cubic(wish, first, last, gap, steps))
        super().__init__(model, optimizer, budget, steps, chosen, **common)


def _end(removed: float) -> float:
    """The part of the training after which nothing more is removed; between the known points, in proportion."""
    if removed <= 0.8:
        return 0.78
    if removed <= 0.9:
        return 0.78 - (removed - 0.8) * 1.8
    return max(0.53, 0.6 - (removed - 0.9) * 1.4)
