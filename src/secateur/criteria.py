"""How much each weight matters: ``criterion(weight, stats) -> scores`` of the weight's shape, larger stays.

Patterns pool these scores into units, so every criterion works with every pattern. A criterion of your own:

    @needs("grad_abs")
    def mine(weight, stats):
        return weight.abs() ** 0.5 * stats["grad_abs"]
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from secateur.errors import DataError
from secateur.graph.graph import Graph
from secateur.graph.types import Axis, Member
from secateur.recipe import choose
from secateur.stats import Stats, collect
from secateur.tasks import Task

Criterion = Callable[[Tensor, Stats], Tensor]


def needs(*names: str) -> Callable[[Criterion], Criterion]:
    """Declare the statistics that a criterion reads."""

    def declare(criterion: Criterion) -> Criterion:
        criterion.needs = frozenset(names)  # type: ignore[attr-defined]
        return criterion

    return declare


def magnitude(weight: Tensor, stats: Stats) -> Tensor:
    """|w| (L1; Han et al. 2015)."""
    return weight.abs()


def l2(weight: Tensor, stats: Stats) -> Tensor:
    """w squared, so that a unit's mean score ranks as its L2 norm."""
    return weight.square()


def random(weight: Tensor, stats: Stats) -> Tensor:
    """Uniform noise from the seed and the weight's name: the baseline that every other criterion must beat."""
    digest = hashlib.blake2b(f"{stats.seed}:{stats.name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.rand(weight.shape, generator=generator).to(weight.device)


@needs("norm_scale")
def bn_scale(weight: Tensor, stats: Stats) -> Tensor:
    """|gamma| of the batch norm that follows (Liu et al. 2017, network slimming).

    All weights of an output share it; an output without a batch norm counts as scaled by one. Within an output,
    |w| relative to the output's largest decides, at a size that never reorders outputs of different gamma much:
    the score is |gamma| * (1 + 1e-3 * |w| / max |w|).
    """
    rows = weight.movedim(stats.out_dim, 0)
    largest = rows.abs().amax(tuple(range(1, rows.ndim)), keepdim=True).clamp_min(1e-30)
    scale = stats["norm_scale"].view(-1, *[1] * (rows.ndim - 1)).to(rows)
    return (scale * (1 + 1e-3 * rows.abs() / largest)).movedim(0, stats.out_dim)


@needs("grad_abs")
def taylor(weight: Tensor, stats: Stats) -> Tensor:
    """|w| * mean |dL/dw|: the first-order change of the loss when w goes (Molchanov et al. 2019), taken per batch
    and per weight, absolute values averaged over the calibration batches."""
    return weight.abs() * stats["grad_abs"]


BUILT_IN: dict[str, Criterion] = {c.__name__: c for c in (magnitude, l2, random, bn_scale, taylor)}


def resolve(criterion: str | Criterion) -> Criterion:
    """A criterion by name, by ``module:function``, or as it is. Raises SpecError for anything else."""
    found: Criterion = choose(criterion, BUILT_IN, "criterion")
    return found


def score(
    model: nn.Module,
    graph: Graph,
    criterion: str | Criterion = "magnitude",
    task: Task | None = None,
    seed: int = 0,
    names: Iterable[str] | None = None,
) -> dict[str, Tensor]:
    """Scores of every maskable weight, or of those in ``names``: float tensors of the weights' shapes.

    A weight without values (on device meta) has none either: it stands for itself, and counts as ones.
    Raises DataError for weights that are NaN or infinite, and for scores that are so or of another shape.
    """
    return dict(each_score(model, graph, criterion, task, seed, names))


def each_score(
    model: nn.Module,
    graph: Graph,
    criterion: str | Criterion = "magnitude",
    task: Task | None = None,
    seed: int = 0,
    names: Iterable[str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """``score``, one weight at a time, so that no more than one weight's scores need to be held."""
    function = resolve(criterion)
    parameters = dict(model.named_parameters())
    wanted = list(graph.weights) if names is None else list(names)
    for name in (name for name in wanted if not parameters[name].is_meta):
        _require_finite(parameters[name].detach(), f"weight {name!r}", "repair or retrain it before pruning")
    stats = collect(model, graph, getattr(function, "needs", ()), task, seed)
    for name in wanted:
        weight = parameters[name].detach()
        if weight.is_meta:
            yield name, weight
            continue
        found = function(weight, stats[name])
        if not isinstance(found, Tensor) or found.shape != weight.shape:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise DataError(f"criterion {_label(criterion)} gave {shape} for {name!r}, expected {list(weight.shape)}")
        if not found.is_floating_point():
            raise DataError(f"criterion {_label(criterion)} gave {found.dtype} for {name!r}, expected floating point")
        _require_finite(found, f"the scores of {name!r} by {_label(criterion)}", "expected finite numbers")
        yield name, found.detach().contiguous()


def pool_units(axes: Sequence[Axis], scores: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """One score per unit of each axis: the mean score of all weights that go with it, float64.

    Producing rows and consuming columns count alike. An axis of which some unit has no scored weight is left out. One
    weight's scores are held at a time, where they come so.
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
    return {name: total / counts[name] for name, total in sums.items() if bool((counts[name] > 0).all())}


def _per_index(scores: Tensor, dim: int) -> Tensor:
    """The sum of the scores at each index of a dimension, float64; ones where there are no values (device meta)."""
    if scores.is_meta:
        return torch.full((scores.shape[dim],), scores.numel() / scores.shape[dim], dtype=torch.float64)
    others = [d for d in range(scores.ndim) if d != dim]  # none: an empty list would sum everything
    wide = torch.promote_types(scores.dtype, torch.float32)
    return (scores.sum(others, dtype=wide) if others else scores).double().cpu()


def _label(criterion: str | Criterion) -> str:
    return repr(criterion) if isinstance(criterion, str) else getattr(criterion, "__name__", repr(criterion))


def _require_finite(tensor: Tensor, what: str, advice: str) -> None:
    if not tensor.numel():
        return
    low, high = torch.aminmax(tensor)  # NaN wins in both; no copy of the tensor is made
    if not bool(low.isfinite() & high.isfinite()):
        bad = int((~tensor.isfinite()).sum())
        raise DataError(f"{bad} of {tensor.numel()} values of {what} are NaN or infinite; {advice}")
