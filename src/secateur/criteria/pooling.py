"""From scores of weights to scores of units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from secateur.graph.types import Axis, Member, Weight


def pool_units(
    axes: Sequence[Axis],
    scores: Iterable[tuple[str, Tensor]],
    how: str = "mean",
    weights: Mapping[str, Weight] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """One score per unit of each axis, float64, from the scores of all weights that go with it.

    how: "mean" or "sum" over all of them, producing rows and consuming columns alike; "outputs" is the mean over the
    rows that produce the unit, along the ``out_dim`` of ``weights``. An axis of which some unit has no such weight is
    left out. One weight's scores are held at a time, where they come so.
    """
    places: dict[str, list[tuple[str, Member]]] = {}
    for axis in axes:
        for member in axis.members:
            if how != "outputs" or (member.tensor in weights and weights[member.tensor].out_dim == member.dim):
                places.setdefault(member.tensor, []).append((axis.name, member))
    sums = {axis.name: torch.zeros(axis.units, dtype=torch.float64) for axis in axes}
    counts = {name: torch.zeros_like(zeros) for name, zeros in sums.items()}
    for tensor, s in scores:
        per_index = {dim: _per_index(s, dim) for dim in {member.dim for _, member in places.get(tensor, ())}}
        for name, member in places.get(tensor, ()):
            units = torch.from_numpy(member.units)
            here = units >= 0
            found = per_index[member.dim][here]
            sums[name].index_add_(0, units[here], found)
            counts[name].index_add_(0, units[here], torch.full_like(found, s.numel() / len(here)))
    whole = {name: total for name, total in sums.items() if bool((counts[name] > 0).all())}
    return whole if how == "sum" else {name: total / counts[name] for name, total in whole.items()}


def _per_index(scores: Tensor, dim: int) -> Tensor:
    """The sum of the scores at each index of a dimension, float64; ones where there are no values (device meta)."""
    if scores.is_meta:
        return torch.full((scores.shape[dim],), scores.numel() / scores.shape[dim], dtype=torch.float64)
    others = [d for d in range(scores.ndim) if d != dim]  # none: an empty list would sum everything
    wide = torch.promote_types(scores.dtype, torch.float32)
    return (scores.sum(others, dtype=wide) if others else scores).double().cpu()
