"""``Graph``: everything that analysis learned about one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from secateur.errors import SpecError
from secateur.graph.program import Program
from secateur.graph.types import Axis, Cost, Declared, Flags, Weight


@dataclass(frozen=True, eq=False)
class Graph:
    """What tracing learned: maskable ``weights`` by name, and ``axes``, frozen ones included.

    ``program`` and ``inputs`` are what was traced, and on which example inputs; ``declared`` is what the user added.
    """

    axes: tuple[Axis, ...]
    weights: Mapping[str, Weight]
    program: Program = field(repr=False)
    inputs: Any = field(repr=False, default=None)
    declared: Declared = field(default_factory=Declared)

    def axis(self, name: str) -> Axis:
        """The axis of that name. Raises SpecError for an unknown one."""
        for axis in self.axes:
            if axis.name == name:
                return axis
        known = ", ".join(a.name for a in self.axes[:5])
        raise SpecError(f"axis {name!r} is not in this graph (it has {known}, …); `secateur inspect` lists them")

    @property
    def free(self) -> tuple[Axis, ...]:
        """The axes whose units may be removed."""
        return tuple(a for a in self.axes if not a.frozen)

    def cost(self, keep: Mapping[str, Flags] | None = None) -> Cost:
        """Parameters, MACs and bytes when ``keep[axis]`` (bool per unit) says what stays; all stays by default."""
        return self.program.cost(self.alive(keep or {}))

    def alive(self, keep: Mapping[str, Flags]) -> Flags:
        """One flag per label: what stays when ``keep`` says which units of which axis stay."""
        alive: Flags = np.ones(self.program.labels, bool)
        for name, flags in keep.items():
            axis = self.axis(name)
            if len(flags) != axis.units:
                raise SpecError(f"axis {name!r} has {axis.units} units, found flags for {len(flags)}")
            alive[axis.atoms[~np.asarray(flags, bool)]] = False
        return alive

    def slices(self, keep: Mapping[str, Flags]) -> dict[str, dict[int, Flags]]:
        """Per tensor and dimension, the indices that stay; only dimensions that lose some are listed."""
        found: dict[str, dict[int, Flags]] = {}
        for name, flags in keep.items():
            for member in self.axis(name).members:
                here = (member.units < 0) | np.asarray(flags, bool)[member.units]
                if not here.all():
                    dims = found.setdefault(member.tensor, {})
                    dims[member.dim] = dims[member.dim] & here if member.dim in dims else here
        return found
