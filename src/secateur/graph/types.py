"""What analysis learned about a model, piece by piece: frozen data, no torch needed to read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    At least ``least`` units must stay.
    """

    name: str
    units: int
    members: tuple[Member, ...]
    frozen: str = ""
    exact: bool = True
    atoms: Units = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)
    least: int = 1


@dataclass(frozen=True)
class Declared:
    """What the user said about a model: ties, by the names of both places; outputs, by number, that may lose units."""

    ties: tuple[tuple[str, str], ...] = ()
    free_outputs: tuple[int, ...] = ()


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


def example_args(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split user inputs (Tensor | tuple of positional | dict of keyword arguments) into args and kwargs."""
    if isinstance(inputs, dict):
        return (), inputs
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}
