"""What each axis is worth: the parameters and MACs that go with it, and with half of its units."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from secateur.graph.graph import Graph


@dataclass(frozen=True)
class Worth:
    """Parameters and MACs that all units of an axis take part in, and that half of the units would save."""

    params: int
    macs: int
    half_params: int
    half_macs: int


def worths(graph: Graph) -> dict[str, Worth]:
    """One for every axis, in program order, frozen ones included; half is rounded down.

    Axes that cross, such as heads and their width, share what both have a part in.
    """
    dense, found = graph.cost(), {}
    for axis in graph.axes:
        none, half = (graph.cost({axis.name: np.arange(axis.units) < kept}) for kept in (0, -(-axis.units // 2)))
        found[axis.name] = Worth(
            dense.params - none.params, dense.macs - none.macs, dense.params - half.params, dense.macs - half.macs
        )
    return found
