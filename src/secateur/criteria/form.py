"""What a criterion is, and what it may declare."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from secateur.stats import Stats

Criterion = Callable[[Tensor, Stats], Tensor]


def needs(*names: str) -> Callable[[Criterion], Criterion]:
    """Declare the statistics that a criterion reads."""

    def declare(criterion: Criterion) -> Criterion:
        criterion.needs = frozenset(names)  # type: ignore[attr-defined]
        return criterion

    return declare


def in_loss_units(criterion: Criterion) -> Criterion:
    """Declare that scores are rises of the loss: those of a unit add up, and compare between axes as they are."""
    criterion.in_loss_units = True  # type: ignore[attr-defined]
    return criterion


def of_outputs(values: Tensor, weight: Tensor, stats: Stats) -> Tensor:
    """Scores of a weight's shape from one value per output, at least zero.

    Within an output, |w| relative to the output's largest decides, at a size that never reorders outputs of different
    value much: the score is value * (1 + 1e-3 * |w| / max |w|).
    """
    rows = weight.movedim(stats.out_dim, 0)
    largest = rows.abs().amax(tuple(range(1, rows.ndim)), keepdim=True).clamp_min(1e-30)
    scale = values.view(-1, *[1] * (rows.ndim - 1)).to(rows)
    return (scale * (1 + 1e-3 * rows.abs() / largest)).movedim(0, stats.out_dim)
