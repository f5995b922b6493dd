"""``Graph``: everything that analysis learned about one model."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from secateur.errors import SpecError
from secateur.graph.blocks import Block, Span, find
from secateur.graph.meter import Meter
from secateur.graph.program import Program
from secateur.graph.types import Axis, Cost, Declared, Flags, Weight
from secateur.graph.without import left, without


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

    def __deepcopy__(self, memo: Any) -> Graph:
        return self  # frozen, and its program is made of stand-ins for tensors, which torch cannot copy

    def axis(self, name: str) -> Axis:
        """The axis of that name. Raises SpecError for an unknown one."""
        if name in self._named:
            return self._named[name]
        known = ", ".join(a.name for a in self.axes[:5])
        raise SpecError(f"axis {name!r} is not in this graph (it has {known}, …); `secateur inspect` lists them")

    @functools.cached_property
    def _named(self) -> dict[str, Axis]:
        return {axis.name: axis for axis in self.axes}

    @functools.cached_property
    def _meter(self) -> Meter:
        return Meter(self.program, self.axes)

    @property
    def free(self) -> tuple[Axis, ...]:
        """The axes whose units may be removed."""
        return tuple(a for a in self.axes if not a.frozen)

    @functools.cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The residual blocks, frozen ones included, in the order of the program."""
        free: Flags = np.zeros(self.program.labels, bool)
        for axis in self.free:
            free[axis.atoms] = True
        taken, why = {axis.name for axis in self.axes}, "an axis has the same name"
        return tuple(replace(b, frozen=why) if b.name in taken else b for b in find(self.program, free))

    def without(self, names: Iterable[str]) -> Graph:
        """This graph where these blocks are left out: axes and weights that live on keep their names and units.

        Raises SpecError for a name that is no block.
        """
        spans = self._spans(names)
        if not spans:
            return self
        program = without(self.program, spans)
        axes = []
        for axis in self.axes:
            if members := tuple(m for m in axis.members if m.tensor in program.tensors):
                axes.append(replace(axis, members=members))
        weights = {name: weight for name, weight in self.weights.items() if name in program.tensors}
        return replace(self, axes=tuple(axes), weights=weights, program=program)

    def cost(self, keep: Mapping[str, Flags] | None = None) -> Cost:
        """Parameters, MACs and bytes when ``keep`` says what stays: a bool per unit of an axis, or one for a block."""
        units, gone = self._split(keep or {})
        return left(self.program, self._spans(gone)).cost(self.alive(units)) if gone else self._meter.cost(units)

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
        """Per tensor and dimension, the indices that stay; only dimensions that lose some are listed.

        A tensor that goes with a block loses all indices of dimension 0.
        """
        found: dict[str, dict[int, Flags]] = {}
        units, gone = self._split(keep)
        for name, flags in units.items():
            for member in self.axis(name).members:
                here = (member.units < 0) | np.asarray(flags, bool)[member.units]
                if not here.all():
                    dims = found.setdefault(member.tensor, {})
                    dims[member.dim] = dims[member.dim] & here if member.dim in dims else here
        if gone:
            stay = left(self.program, self._spans(gone)).tensors
            for name, tensor in self.program.tensors.items():
                if name not in stay and tensor.kind != "constant" and tensor.shape:
                    found[name] = {0: np.zeros(tensor.shape[0], bool)}
        return found

    def _split(self, keep: Mapping[str, Flags]) -> tuple[dict[str, Flags], list[str]]:
        """The flags of axes, and the names of the blocks that go."""
        axes = self._named.keys()
        if keep.keys() <= axes:
            return dict(keep), []
        blocks = [name for name in keep if name not in axes]
        self._spans(blocks)  # all of them are blocks
        return {n: f for n, f in keep.items() if n in axes}, [n for n in blocks if not np.asarray(keep[n]).all()]

    def _spans(self, names: Iterable[str]) -> list[Span]:
        known = {block.name: block for block in self.blocks}
        for name in names:
            if name not in known:
                some = ", ".join([*(a.name for a in self.axes[:3]), *list(known)[:3]])
                raise SpecError(
                    f"{name!r} is no axis and no block of this graph (it has {some}, …); `secateur inspect` lists them"
                )
        return [span for name in names for span in known[name].spans]
