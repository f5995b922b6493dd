"""From scores of weights to scores of units."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from secateur.graph.types import Axis, Member


def pool_units(axes: Sequence[Axis], scores: Iterable[tuple[str, Tensor]], *, total: bool = False) -> dict[str, Tensor]:
    """One score per unit of each axis: the mean score of all weights that go with it, or with ``total`` their sum.

    float64. Producing rows and consuming columns count alike. An axis of which some unit has no scored weight is left
    out. One weight's scores are held at a time, where they come so.
    """
    places: dict[str, list[tuple[str, Member]]] = {}
    for axis in axes:
        for member in axis.members:
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
    scored = [name for name, n in counts.items() if bool((n > 0).all())]
    return {name: sums[name] if total else sums[name] / counts[name] for name in scored}


def _per_index(scores: Tensor, dim: int) -> Tensor:
    """The sum of the scores at each index of a dimension, float64; ones where there are no values (device meta)."""
    if scores.is_meta:
        return torch.full((scores.shape[dim],), scores.numel() / scores.shape[dim], dtype=torch.float64)
    others = [d for d in range(scores.ndim) if d != dim]  # none: an empty list would sum everything
    wide = torch.promote_types(scores.dtype, torch.float32)
    return (scores.sum(others, dtype=wide) if others else scores).double().cpu()
