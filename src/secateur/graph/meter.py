"""What plans cost, one after another: only what differs from the last one is counted again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from secateur.errors import SpecError
from secateur.graph.program import Program
from secateur.graph.types import Axis, Cost, Flags


class Meter:
    """Costs of one program. A bisection asks for many plans that keep most axes as they were."""

    def __init__(self, program: Program, axes: Sequence[Axis]) -> None:
        self._program = program
        self._axes = {axis.name: i for i, axis in enumerate(axes)}
        self._atoms = [axis.atoms for axis in axes]
        self._kept: list[Flags] = [np.ones(axis.units, bool) for axis in axes]
        self._thinned: set[int] = set()  # axes that may not be whole
        self._alive: Flags = np.ones(program.labels, bool)
        self._counts = program.sizes.counts(self._alive)
        self._places: list[list[int]] = [[] for _ in axes]  # per axis, the sizes that it is part of
        owner = np.full(program.labels, -1, np.int32)
        for i, axis in enumerate(axes):
            owner[axis.atoms] = i
        for place, atoms in enumerate(program.sizes.labelled):
            for i in np.unique(owner[atoms]):
                if i >= 0:
                    self._places[i].append(place)

    def cost(self, keep: Mapping[str, Flags]) -> Cost:
        """The cost when ``keep[axis]`` (bool per unit) says what stays; axes that are not named stay whole."""
        wanted = {self._axes[name]: np.asarray(flags, bool) for name, flags in keep.items()}
        for name, flags in zip(keep, wanted.values(), strict=True):
            if len(flags) != len(self._kept[self._axes[name]]):
                units = len(self._kept[self._axes[name]])
                raise SpecError(f"axis {name!r} has {units} units, found flags for {len(flags)}")
        stale: set[int] = set()
        for i in {*wanted, *self._thinned}:
            new = wanted.get(i, np.ones(len(self._kept[i]), bool))
            if not np.array_equal(self._kept[i], new):
                self._kept[i] = new.copy()
                self._thinned.add(i)
                self._alive[self._atoms[i]] = new
                stale.update(self._places[i])
        self._thinned &= wanted.keys()
        for place in stale:
            self._counts[place] = self._program.sizes.count(place, self._alive)
        return self._program.sizes.cost(self._counts)
