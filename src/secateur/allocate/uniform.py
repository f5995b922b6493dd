"""Every place loses the same part of its units."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class Uniform:
    """Rung r of R keeps (R - r) / R of the units of every place, rounded down."""

    def __init__(self, scores: Mapping[str, Tensor], relative: bool = False) -> None:
        self.sizes = {place: s.numel() for place, s in scores.items()}
        self.rungs = max(sum(self.sizes.values()), 1)

    def kept(self, rung: int) -> dict[str, int]:
        return {place: n * (self.rungs - rung) // self.rungs for place, n in self.sizes.items()}
