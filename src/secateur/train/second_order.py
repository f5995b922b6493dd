"""Second-order pruning: what stays makes up for what goes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.budget import Budget
from secateur.errors import DataError, PruneError, SpecError
from secateur.graph.types import Weight
from secateur.patterns import Block
from secateur.plan import Plan
from secateur.stats.gradients import BLOCK, DAMPING, damped, require_room
from secateur.train import stages
from secateur.train.choose import Masks
from secateur.train.pruner import Common, Pruner, final
from secateur.train.shards import finite_everywhere
from secateur.train.stages import Stage

_TOGETHER = 2048
"""Blocks that are inverted at once."""


class SecondOrder(Pruner):
    """Gradual pruning by the optimal brain surgeon (Kurtic et al. 2022, oBERT; Singh and Alistarh 2020, WoodFisher).

    With the empirical Fisher matrix F = damping I + 1/m sum g g^T, in blocks of consecutive inputs of an output, a
    weight scores rho_q = w_q^2 / (2 [F^-1]_qq), what the loss rises by when it goes and the rest of its block makes up
    for that; a block of a pattern, P, scores w_P^T ([F^-1]_PP)^-1 w_P / 2. What stays of a Fisher block where P goes is
    updated, for all of P at once, by dw = -F^-1[:, P] ([F^-1]_PP)^-1 w_P.

    g are the gradients of the training's own steps, means over their batches, the last ``window`` before each update;
    between windows nothing is gathered. Fisher blocks have up to 50 inputs, an output's inputs divided evenly; they
    take 8 * 50 bytes a weight, in float64.

    begin, end, every: the first and last update, and the steps between two. By default the paper's epochs 2, 26 and 4
        of 30, in parts of ``steps``, but not before ``window`` steps.
    first: the part of the removal that the first update does; the rest follows a cubic curve. The paper's 70 %.
    window: the paper has 1024 single examples, here they are 64 batches.
    damping: 1e-7 in the paper.
    schedule: updates of one's own instead, (step, budget) pairs.

    See ``Pruner`` for everything else; there is no other criterion. Raises DataError for weights whose blocks take more
    than ``stats.gradients.LARGEST``, SpecError where processes share weights by their inputs.
    """

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
        first: float = 0.7,
        window: int = 64,
        damping: float = DAMPING,
        schedule: Iterable[tuple[int, str | None]] | None = None,
        **common: Unpack[Common],
    ) -> None:
        steps = stages.number(steps)
        if "criterion" in common:
            raise SpecError("SecondOrder has a criterion of its own; leave criterion out, or use Gradual")
        if not 0 <= first <= 1 or window < 1 or not damping > 0:
            raise SpecError(
                f"found first={first}, window={window}, damping={damping}; expected a part of the removal from 0 to 1, "
                "a number of steps, and a number above 0"
            )
        self.window, self.damping = window, damping
        wish = final(common.get("pattern", "unstructured"), budget)
        if schedule is not None:
            chosen = stages.given(schedule, steps, wish)
        else:
            last = steps * 26 // 30 if end is None else end
            start = min(last, max(window, steps // 15)) if begin is None else begin
            between = stages.between(start, last, every or max(1, steps * 4 // 30), steps)
            chosen = tuple(jump(wish, first, between))
        super().__init__(model, optimizer, budget, steps, chosen, **common)
        try:
            self._require_blocks()
        except PruneError:
            self.detach()
            raise

    def change(self, stage: Stage) -> None:
        assert stage.budget is not None
        assert isinstance(self.wish, Masks)
        scores = {name: self._scores(name) for name in self.weights}
        self._require_finite(scores, "the scores")
        masks = self.wish.best(scores, stage.budget)
        new = {name: self._updated(name, mask) for name, mask in masks.items()}
        self._require_finite(new, "the updated values")
        for name, value in new.items():
            self.value(name).copy_(value)
        self.set_masks(masks)
        for kept in self.state.values():
            kept.clear()

    def plan(self) -> Plan:
        found = super().plan()
        return replace(found, meta={**found.meta, "criterion": "second_order"})

    def _gather(self) -> None:
        """The Fisher blocks of the coming update; those of a step where any gradient is not finite do not count."""
        if self.done == len(self.schedule) or self.applied < self.schedule[self.done].step - self.window:
            return
        grads = {n: g for n, _, g in self.live() if n in self.weights and g is not None}
        if not grads or not all(finite_everywhere(grads.values(), self.group)):
            return
        for name, grad in grads.items():
            mask = self.mask(name)
            rows = in_blocks(grad.double() if mask is None else grad.double() * mask, self.weights[name])
            kept = self.state[name]
            if "fisher" not in kept:
                kept["fisher"] = rows.new_zeros(*rows.shape, rows.shape[-1])
                kept["gradients"] = torch.zeros((), dtype=torch.int64, device=rows.device)
            flat = rows.flatten(0, 1)
            kept["fisher"].view(-1, *kept["fisher"].shape[2:]).baddbmm_(flat[:, :, None], flat[:, None, :])
            kept["gradients"] += 1

    def _require_blocks(self) -> None:
        require_room(
            sum(math.prod(part.local_shape) for part in self.parts.values()), "Gradual with criterion='fisher'"
        )
        for name, part in self.parts.items():
            if part.group is not None and self.weights[name].out_dim != 0:
                raise SpecError(
                    f"processes share {name!r} by its inputs, and second-order blocks are of inputs; ignore= it"
                )

    def _fisher(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """The damped blocks of a weight, some at a time, with their place among all of its blocks."""
        kept = self.state[name]
        if "fisher" not in kept:
            raise DataError(f"no gradient of {name!r} was seen yet")
        blocks = kept["fisher"].flatten(0, 1)
        for start in range(0, len(blocks), _TOGETHER):
            at = slice(start, start + _TOGETHER)
            yield at, damped(blocks[at] / kept["gradients"], self.damping)

    def _scores(self, name: str) -> Tensor:
        """Scores of the weight's shape, whose sum over each unit of the pattern is the unit's."""
        weight = self.weights[name]
        rows = in_blocks(self.value(name).double(), weight)
        w, scores = rows.flatten(0, 1), torch.zeros_like(rows.flatten(0, 1))
        together = self._together(rows)
        for at, fisher in self._fisher(name):
            inverse = torch.linalg.inv_ex(fisher).inverse  # singular ones give what is not finite
            if together is None:
                scores[at] = w[at].square() / (2 * inverse.diagonal(dim1=1, dim2=2))
            else:
                inside = torch.arange(len(rows) * rows.shape[1], device=w.device)[at] % rows.shape[1]
                theirs = torch.where(together[inside], inverse, 0)
                scores[at] = w[at] * torch.linalg.solve_ex(theirs, w[at]).result / 2
        return out_of_blocks(scores.view(rows.shape), weight, self.parts[name].local_shape).float()

    def _together(self, rows: Tensor) -> Tensor | None:
        """Which pairs of each of a row's Fisher blocks belong to one block of the pattern; None where none do."""
        if not isinstance(self.pattern, Block) or self.pattern.cols == 1:
            return None
        numbers = torch.arange(rows[0].numel(), device=rows.device).view(rows.shape[1:]) // self.pattern.cols
        return numbers[:, :, None] == numbers[:, None, :]

    def _updated(self, name: str, mask: Tensor) -> Tensor:
        """What stays of a weight, brought to where the quadratic model of the loss is lowest; the rest is zero.

        With K what stays, dw_K = (F_KK)^-1 F_KP w_P: the same as through the inverse, and nothing is inverted twice.
        """
        weight, value = self.weights[name], self.value(name).double()
        rows, kept = in_blocks(value, weight), in_blocks(mask, weight).flatten(0, 1)
        w = rows.flatten(0, 1)
        new = w * kept
        for at, fisher in self._fisher(name):
            changed = ((w[at] != 0) & ~kept[at]).any(1)
            f, k, gone = fisher[changed], kept[at][changed], (w[at] * ~kept[at])[changed]
            alone = torch.where(k[:, :, None] & k[:, None, :], f, 0) + torch.diag_embed((~k).double())
            step = torch.linalg.solve_ex(alone, (f @ gone[:, :, None])[:, :, 0] * k).result
            new[at][changed] += step
        return out_of_blocks(new.view(rows.shape), weight, self.parts[name].local_shape).to(self.value(name).dtype)

    def _require_finite(self, tensors: Mapping[str, Tensor], what: str) -> None:
        """Raise DataError, in all processes, where one has something that is not finite."""
        finite = finite_everywhere(tensors.values(), self.group)
        if wrong := [name for name, fine in zip(tensors, finite, strict=True) if not fine]:
            raise DataError(f"{what} of {wrong[0]!r} are not finite; look at the loss and the learning rate")


def jump(budget: Budget, first: float, steps: range) -> Iterator[Stage]:
    """``first`` of the removal at once, the rest along a cubic curve."""
    rest = 1 - Fraction(first).limit_denominator(10**6)
    for step in steps:
        left = Fraction(steps[-1] - step, max(1, steps[-1] - steps[0]))
        yield Stage(step, stages.partly(budget, 1 - rest * left**3))


def in_blocks(tensor: Tensor, weight: Weight) -> Tensor:
    """(outputs, blocks, inputs of a block): a tensor of the shape of what is here of a weight, filled up with zeros."""
    rows = tensor.movedim(weight.out_dim, 0).flatten(1)
    count, size = _division(rows.shape[1])
    return F.pad(rows, (0, count * size - rows.shape[1])).view(len(rows), count, size)


def out_of_blocks(blocks: Tensor, weight: Weight, shape: tuple[int, ...]) -> Tensor:
    """The inverse of ``in_blocks``."""
    moved = [n for d, n in enumerate(shape) if d != weight.out_dim]
    rows = blocks.flatten(1)[:, : math.prod(moved)]
    return rows.reshape(len(rows), *moved).movedim(0, weight.out_dim)


def _division(inputs: int) -> tuple[int, int]:
    """How many blocks, and of how many inputs; as few as can be, of one size."""
    count = math.ceil(inputs / BLOCK)
    return count, math.ceil(inputs / count)
