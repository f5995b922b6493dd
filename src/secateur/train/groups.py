"""Weights that belong to one unit of an axis, wherever it shows up: what penalties on channels are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import SpecError
from secateur.graph.graph import Graph
from secateur.graph.types import Axis, Member
from secateur.names import Choice, chosen
from secateur.stats.gradients import wide

Tensors = Callable[[str], Tensor | None]
"""A parameter, or its gradient, by name."""

PerUnit = Mapping[str, Tensor]
"""One number for every unit of each axis."""


@dataclass(frozen=True, eq=False)
class Place:
    """Where an axis shows up in a parameter: as ``Member``, with the indices of every unit, filled up with -1."""

    tensor: str
    dim: int
    units: Tensor
    indices: Tensor

    def spread(self, values: Tensor, otherwise: float, like: Tensor) -> Tensor:
        """Values of units, broadcastable to the parameter; ``otherwise`` where no unit of the axis is."""
        padded = torch.cat([values.to(like), like.new_full((1,), otherwise)])
        return padded[self.units.to(like.device)].view([-1 if d == self.dim else 1 for d in range(like.ndim)])

    def pooled(self, tensor: Tensor) -> Tensor:
        """The sum of each unit's elements; always in the same order, which an ``index_add_`` on a GPU is not."""
        others = [d for d in range(tensor.ndim) if d != self.dim]
        sums = tensor.sum(others) if others else tensor
        return torch.cat([sums, sums.new_zeros(1)])[self.indices.to(tensor.device)].sum(1)

    def sizes(self, tensor: Tensor) -> Tensor:
        """How many elements each unit has, in float32."""
        counts = (self.indices >= 0).sum(1) * (tensor.numel() // tensor.shape[self.dim])
        return counts.to(tensor.device, torch.float32)


@dataclass(frozen=True, eq=False)
class Groups:
    """The trainable parameters of free axes, per axis.

    An element in a row of one axis and a column of another belongs to a unit of each.
    """

    axes: Mapping[str, Sequence[Place]]

    @classmethod
    def of(cls, model: nn.Module, graph: Graph | None, ignore: Choice | Sequence[Choice] = ()) -> Groups:
        """Of the axes that can lose units to a budget: free, not ignored, and with a weight to score for every unit.

        Without a graph there are none.
        """
        if graph is None:
            return cls({})
        ignored = chosen(ignore, [*graph.weights, *(a.name for a in graph.axes)], model, "ignore")
        trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
        found = {}
        for axis in graph.free:
            if axis.name not in ignored and ignored.isdisjoint(m.tensor for m in axis.members) and _scored(axis, graph):
                found[axis.name] = [_place(m, axis.units) for m in axis.members if m.tensor in trained]
        return cls(found)

    def only(self, names: frozenset[str]) -> Groups:
        """Those of these parameters."""
        found = {axis: [p for p in places if p.tensor in names] for axis, places in self.axes.items()}
        return Groups({axis: places for axis, places in found.items() if places})

    def sizes(self, tensors: Tensors) -> dict[str, Tensor]:
        """Weights of every unit."""
        return self._summed(tensors, lambda place, weight: place.sizes(weight))

    def norms(self, tensors: Tensors) -> dict[str, Tensor]:
        """The L2 norm of all weights of every unit, in float32 at least."""
        squares = self._summed(tensors, lambda place, w: place.pooled(w.to(wide(w.dtype)).square()))
        return {axis: sums.sqrt() for axis, sums in squares.items()}

    def pull(self, tensors: Tensors, grads: Tensors, by: PerUnit) -> None:
        """Add ``by`` times the weight to the gradients of every unit's weights, where there are gradients."""
        for axis, places in self.axes.items():
            for place in places:
                weight, grad = tensors(place.tensor), grads(place.tensor)
                if weight is not None and grad is not None:
                    grad.addcmul_(weight.to(grad), place.spread(by[axis], 0.0, grad))

    def _summed(self, tensors: Tensors, of: Callable[[Place, Tensor], Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for axis, places in self.axes.items():
            for place in places:
                if (weight := tensors(place.tensor)) is not None:
                    value = of(place, weight)
                    found[axis] = found[axis] + value.to(found[axis]) if axis in found else value
        return found


def _scored(axis: Axis, graph: Graph) -> bool:
    units = [m.units for m in axis.members if m.tensor in graph.weights]
    return bool(units) and len(np.setdiff1d(np.concatenate(units), [-1])) == axis.units


def _place(member: Member, count: int) -> Place:
    """Members hold the unit of every index; here are the indices of every unit, too."""
    at = [np.flatnonzero(member.units == unit) for unit in range(count)]
    indices = np.full((count, max(map(len, at))), -1, np.int64)
    for row, places in zip(indices, at, strict=True):
        row[: len(places)] = places
    return Place(member.tensor, member.dim, torch.from_numpy(member.units.copy()), torch.from_numpy(indices))


def strength_of(value: Any, what: str = "strength") -> float:
    """The factor of a penalty. Raises SpecError for one below zero, or no number."""
    if not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise SpecError(f"{what} is {value!r}; expected the factor of a penalty, such as 1e-4")
    return float(value)
