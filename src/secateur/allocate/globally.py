"""All units of all places compete: the lowest scores go first, wherever they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.allocate.kth import between, count, kth_smallest


class Global:
    """Rung r removes the r lowest-scored units; among equal scores those of the last places go first.

    With ``relative`` scores are first divided by their place's mean magnitude, so that places whose scores are of
    different scale (because a norm follows, or a layer is wide) can compete.

    Rungs asked for before bound the next one, and only scores between those bounds are looked at again: a bisection
    costs little more than its first step.
    """

    def __init__(self, scores: Mapping[str, Tensor], relative: bool = False) -> None:
        self.total = {place: s.numel() for place, s in scores.items()}
        self.rungs = sum(self.total.values())
        like = max(scores.values(), key=lambda s: torch.finfo(s.dtype).bits)
        self._scores = [(_relative(s) if relative else s).to(like) for s in scores.values()]
        none, everything = [0] * len(scores), list(self.total.values())
        infinity = torch.full((), math.inf).to(like)
        self._splits = [_Split(-infinity, none, none), _Split(infinity, everything, everything)]
        self._window, self._between = (-infinity, infinity), self._scores

    def kept(self, rung: int) -> dict[str, int]:
        split = self._split(rung)
        removed = list(split.below)
        ties = rung - sum(removed)
        for i in reversed(range(len(removed))):
            taken = min(ties, split.upto[i] - split.below[i])
            removed[i] += taken
            ties -= taken
        return {place: n - gone for (place, n), gone in zip(self.total.items(), removed, strict=True)}

    def _split(self, rung: int) -> _Split:
        """The split at the value where the ``rung`` lowest scores end."""
        for split in self._splits:
            if sum(split.below) <= rung <= sum(split.upto):
                return split
        low = max((s for s in self._splits if sum(s.upto) < rung), key=lambda s: s.value)
        high = min((s for s in self._splits if sum(s.below) > rung), key=lambda s: s.value)
        self._look_between(low.value, high.value)
        value = kth_smallest(self._between, rung - sum(low.upto))
        below, upto = (
            [n + count([s], compare, value) for n, s in zip(low.upto, self._between, strict=True)]
            for compare in (torch.lt, torch.le)
        )
        self._splits.append(_Split(value, below, upto))
        return self._splits[-1]

    def _look_between(self, low: Tensor, high: Tensor) -> None:
        """Make ``_between`` the scores strictly between two values, from the old ones where those include them."""
        if not self._window[0] <= low <= high <= self._window[1]:
            self._between = self._scores
        if (low, high) != self._window:
            self._between = [between(s, low, high) for s in self._between]
            self._window = (low, high)


@dataclass(frozen=True)
class _Split:
    """Per place, how many scores lie below ``value``, and how many below or at it."""

    value: Tensor
    below: list[int]
    upto: list[int]


def _relative(scores: Tensor) -> Tensor:
    scores = scores.double()
    return scores / scores.abs().mean().clamp_min(torch.finfo(torch.float64).tiny)
