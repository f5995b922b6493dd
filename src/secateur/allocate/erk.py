"""Layers with more parameters for their size keep a smaller part of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from secateur.allocate.paths import Paths

Shapes = Sequence[tuple[int, ...]]
"""The shapes of all weights of a place."""


class ErdosRenyi(Paths):
    """The part of its units that a place keeps is in proportion to the sum of its weights' dimensions over the product
    of them (Erdős-Rényi-kernel; Evci et al. 2020), and at most one: first the widest layers lose units, then others.

    Where units of an axis go, these are the sums over all weights that go with it. Everything else of the scores than
    their number is ignored.
    """

    needs = frozenset({"shapes"})

    def __init__(self, scores: Mapping[str, Tensor], relative: bool = False, *, shapes: Mapping[str, Shapes]) -> None:
        density = {place: _density(shapes[place]) for place in scores}
        least = min(density.values())
        paths = {place: ([0.0, 1 - least / d, 1.0], [0.0, 0.0, 1.0]) for place, d in density.items()}
        super().__init__({place: s.numel() for place, s in scores.items()}, paths)


def _density(shapes: Shapes) -> float:
    sizes = 0
    for shape in shapes:
        size = 1
        for n in shape:
            size *= n
        sizes += size
    return sum(sum(shape) for shape in shapes) / max(sizes, 1)
