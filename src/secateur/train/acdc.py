"""AC/DC: sparse and dense by turns."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import Unpack

import torch
from torch import nn

from secateur.budget import Budget
from secateur.errors import SpecError
from secateur.train import averages, stages
from secateur.train.pruner import Common, Pruner, final
from secateur.train.stages import Stage


class ACDC(Pruner):
    """Alternating compressed and decompressed training (Peste et al. 2021).

    After a dense warm-up, sparse phases, which each begin with a mask by magnitude over all weights, take turns with
    dense ones, in which what had gone trains again, from zero. At the end come a longer dense phase, and a longer
    sparse one. Where a dense phase begins, the optimizer forgets all moments of all parameters, and Adam its count of
    steps, which corrects them: it is as if new.

    warmup, phase, last_dense, last_sparse: parts of ``steps``. The defaults are the paper's epochs 10, 5, 10 and 15 of
        100: masks at 10, 20 … 70 and 85 %, dense from 15, 25 … 65 and 75 % on.
    schedule: phases of one's own instead, (step, budget) pairs such as (100, "sparsity=90%") for a sparse one and
        (200, None) for a dense one, the last one with ``budget``.

    See ``Pruner`` for everything else. Raises SpecError for phases that do not fit into ``steps``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        budget: str | None = None,
        steps: int = 0,
        *,
        warmup: float = 0.1,
        phase: float = 0.05,
        last_dense: float = 0.1,
        last_sparse: float = 0.15,
        schedule: Iterable[tuple[int, str | None]] | None = None,
        **common: Unpack[Common],
    ) -> None:
        steps = stages.number(steps)
        wish = final(common.get("pattern", "unstructured"), budget)
        if schedule is not None:
            chosen = stages.given(schedule, steps, wish)
        else:
            chosen = phases(wish, steps, warmup, phase, last_dense, last_sparse)
        super().__init__(model, optimizer, budget, steps, chosen, **common)

    def change(self, stage: Stage) -> None:
        super().change(stage)
        if stage.budget is None:
            averages.reset_moments(self.optimizer)


def phases(
    budget: Budget, steps: int, warmup: float, phase: float, last_dense: float, last_sparse: float
) -> tuple[Stage, ...]:
    """The stages of alternating phases. Raises SpecError for parts of ``steps`` that do not fit."""
    first, length, dense, sparse = (
        Fraction(part).limit_denominator(10**6) for part in (warmup, phase, last_dense, last_sparse)
    )
    end = 1 - sparse - dense
    if first < 0 or length <= 0 or dense <= 0 or sparse < 0 or first >= end:
        raise SpecError(
            f"phases do not fit: a warm-up of {warmup} and then phases of {phase} before the last ones, {last_dense} "
            f"dense and {last_sparse} sparse; expected parts of steps, above 0, that leave room before the last ones"
        )
    turns = -(-(end - first) // length)  # that begin before the end
    turns -= 1 - turns % 2  # the last of them is a sparse one
    starts = [*(first + i * length for i in range(int(turns))), end, end + dense]
    at = [round(start * steps) for start in starts]
    if len(set(at)) < len(at):
        raise SpecError(f"phases of {phase} of {steps} steps are shorter than a step; expected longer ones")
    return tuple(Stage(step, None if i % 2 else budget) for i, step in enumerate(at))
