"""Ladders on which every place follows a path of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

Path = tuple[Sequence[float], Sequence[float]]
"""Levels from 0 to 1, and the part of a place's units that has gone at each; both never fall, parts end at 1."""


class Paths:
    """Rung r stands for the level r / rungs, from nothing gone to everything; between two levels, in proportion."""

    rungs = 1 << 40

    def __init__(self, sizes: Mapping[str, int], paths: Mapping[str, Path]) -> None:
        self.sizes, self.paths = sizes, paths

    def kept(self, rung: int) -> dict[str, int]:
        level = rung / self.rungs
        return {place: n - int(n * np.interp(level, *self.paths[place])) for place, n in self.sizes.items()}
