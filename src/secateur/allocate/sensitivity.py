"""Every place loses as many units as raise the loss alike, as it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from secateur.allocate.paths import Paths
from secateur.errors import SpecError

_EVEN = 1e-9
"""How much of a level is the part that has gone: among places whose loss does not rise, all lose the same part."""


@dataclass(frozen=True)
class Curve:
    """What the loss rises by when a place alone loses these parts of its units, in the order of their scores."""

    place: str
    removed: tuple[float, ...]
    rise: tuple[float, ...]

    def fitted(self) -> tuple[float, ...]:
        """The closest rises, in least squares, that never fall and are at least 0 (isotonic regression)."""
        n = len(self.rise)

        def mean(i: int, j: int) -> float:
            return sum(self.rise[i : j + 1]) / (j + 1 - i)

        lowest = [[min(mean(i, j) for j in range(k, n)) for i in range(k + 1)] for k in range(n)]
        return tuple(max(0.0, *means) for means in lowest)


@dataclass(frozen=True)
class Sensitivity:
    """A strategy of measured curves: each rung removes, everywhere, what raises the loss up to one level.

    The first units of a place go in proportion to its first measured rise, from 0; what lies beyond the largest part
    that was measured is gone at the largest rise of all places, so that nothing is emptied on the strength of a guess.

    curves: of every place; ``secateur.sensitivity.measure`` makes them. None: they are measured when a plan is made
    with a task. folder: where measured curves are kept, and found again for the same weights, scores and data.
    """

    curves: Mapping[str, Curve] | None = None
    folder: Path | str | None = None
    __name__ = "sensitivity"

    def __call__(self, scores: Mapping[str, Tensor], relative: bool = False) -> Paths:
        if self.curves is None:
            raise SpecError(
                "allocation 'sensitivity' measures the model; use secateur.plan or secateur.prune, with task="
            )
        if missing := scores.keys() - self.curves.keys():
            raise SpecError(
                f"there is no sensitivity curve of {min(missing)!r}; measure it with the same pattern and ignore="
            )
        rises = {place: self.curves[place].fitted() for place in scores}
        largest = max((rise[-1] for rise in rises.values()), default=0.0) or 1.0
        paths = {}
        for place, rise in rises.items():
            parts = (0.0, *self.curves[place].removed, 1.0)
            levels = (level / largest for level in (0.0, *rise, largest))
            paths[place] = ([(1 - _EVEN) * x + _EVEN * part for x, part in zip(levels, parts, strict=True)], parts)
        return Paths({place: s.numel() for place, s in scores.items()}, paths)


def curves_of(strategy: object) -> tuple[Curve, ...]:
    """The curves that a strategy goes by; none where it goes by something else."""
    return tuple((strategy.curves or {}).values()) if isinstance(strategy, Sensitivity) else ()
