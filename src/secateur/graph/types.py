"""What analysis learned about a model: frozen data, no torch graph knowledge needed to read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from secateur.errors import SpecError

if TYPE_CHECKING:
    from secateur.graph.program import Program

Units = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Member:
    """Where an axis shows up: ``units[i]`` is the unit at index ``i`` of ``tensor``'s dimension ``dim``.

    ``units`` has the dimension's length; -1 marks indices that do not belong to the axis.
    """

    tensor: str
    dim: int
    units: Units


@dataclass(frozen=True, eq=False)
class Axis:
    """Units (channels) that can only be removed together, wherever they show up.

    ``frozen`` is empty where units may be removed, otherwise the reason why not. ``exact`` says
    whether removing a unit equals zeroing it (false under a norm or mean over the units).
    """

    name: str
    units: int
    members: tuple[Member, ...]
    frozen: str = ""
    exact: bool = True
    atoms: Units = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)


@dataclass(frozen=True)
class Weight:
    """A maskable weight: the parameter of a convolution, linear layer or matrix product.

    ``out_dim`` and ``in_dim`` are the dimensions of outputs and inputs; ``macs`` counts its
    multiply-adds on the example inputs over all its uses; ``norm`` names the scale of the batch
    norm that follows ("" where none does).
    """

    name: str
    shape: tuple[int, ...]
    op: str
    out_dim: int
    in_dim: int
    macs: int
    norm: str = ""

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape))


@dataclass(frozen=True)
class Cost:
    """What a model costs: parameters, the part of them in maskable weights, MACs, bytes of tensors."""

    params: int
    weights: int
    macs: int
    bytes: int


@dataclass(frozen=True, eq=False)
class Graph:
    """What tracing learned: maskable ``weights`` by name, and ``axes``, frozen ones included.

    ``program`` and ``inputs`` are what was traced, and on which example inputs.
    """

    axes: tuple[Axis, ...]
    weights: Mapping[str, Weight]
    program: Program = field(repr=False)
    inputs: Any = field(repr=False, default=None)

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


def example_args(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split user inputs (Tensor | tuple of positional | dict of keyword arguments) into args and kwargs."""
    if isinstance(inputs, dict):
        return (), inputs
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}
