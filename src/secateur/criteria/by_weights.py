"""Criteria that look at weights only."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.criteria.form import needs, of_outputs
from secateur.stats import Stats
from secateur.stats.gradients import seeded, wide

_ROWS = 1024
"""Filters whose distances to all others are held at once."""


def magnitude(weight: Tensor, stats: Stats) -> Tensor:
    """|w| (L1; Han et al. 2015)."""
    return weight.abs()


def l2(weight: Tensor, stats: Stats) -> Tensor:
    """w squared, so that a unit's mean score ranks as its L2 norm."""
    return weight.square()


def random(weight: Tensor, stats: Stats) -> Tensor:
    """Uniform noise from the seed and the weight's name: the baseline that every other criterion must beat."""
    return torch.rand(weight.shape, generator=seeded(f"{stats.seed}:{stats.name}")).to(weight.device)


@needs("norm_scale")
def bn_scale(weight: Tensor, stats: Stats) -> Tensor:
    """|gamma| of the batch norm that follows (Liu et al. 2017, network slimming).

    All weights of an output share it (see ``of_outputs``); an output without a batch norm counts as scaled by one.
    """
    return of_outputs(stats["norm_scale"], weight, stats)


def fpgm(weight: Tensor, stats: Stats) -> Tensor:
    """The mean Euclidean distance of each filter to the others of its layer (He et al. 2019).

    Those nearest to all others, at the geometric median, are the ones that the others can stand in for. All weights of
    a filter share it (see ``of_outputs``).
    """
    filters = weight.movedim(stats.out_dim, 0).flatten(1).to(wide(weight.dtype))
    sums = torch.cat([torch.cdist(part, filters).sum(1) for part in torch.split(filters, _ROWS)])
    return of_outputs(sums / max(len(filters) - 1, 1), weight, stats)


def lamp(weight: Tensor, stats: Stats) -> Tensor:
    """w² / the sum of the squares of all weights of the layer that are not smaller (Lee et al. 2021).

    The largest weight of a layer scores 1 (less where several are as large), so that no layer loses all of its weights
    while others have some to lose.
    """
    squares = weight.flatten().to(wide(weight.dtype)).square()
    ordered = squares.sort().values
    from_here = ordered.flip(0).cumsum(0).flip(0)
    first = torch.searchsorted(ordered, squares)  # of equal squares the first: all of them are not smaller
    tiny = torch.finfo(squares.dtype).tiny
    return (squares / from_here[first].clamp_min(tiny)).view(weight.shape)
