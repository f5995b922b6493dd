"""All units of all places compete: the lowest scores go first, wherever they are."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from secateur.allocate.kth import kth_smallest, smallest_below


class Global:
    """Rung r removes the r lowest-scored units; among equal scores those of the last places go first.

    With ``relative`` scores are first divided by their place's mean, so that places whose scores are of
    different scale (because a norm follows, or a layer is wide) can compete.
    """

    def __init__(self, scores: Mapping[str, Tensor], relative: bool = False) -> None:
        self.places = list(scores)
        self.scores = [s / s.double().mean().clamp_min(1e-30).to(s) if relative else s for s in scores.values()]
        self.rungs = sum(s.numel() for s in self.scores)

    def kept(self, rung: int) -> dict[str, int]:
        sizes = [s.numel() for s in self.scores]
        if rung >= self.rungs:
            return dict.fromkeys(self.places, 0)
        value = kth_smallest(self.scores, rung)
        below = smallest_below(self.scores, value)
        ties = rung - sum(below)
        removed = list(below)
        for i in reversed(range(len(self.scores))):
            if ties <= 0:
                break
            equal = min(ties, int((self.scores[i] == value).sum()))
            removed[i] += equal
            ties -= equal
        return {place: n - r for place, n, r in zip(self.places, sizes, removed, strict=True)}
