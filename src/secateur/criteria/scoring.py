"""From weights to scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from secateur.criteria import by_data, by_weights
from secateur.criteria.form import Criterion
from secateur.errors import DataError
from secateur.graph.graph import Graph
from secateur.recipe import choose
from secateur.stats import collect
from secateur.tasks import Task

_ALL: tuple[Criterion, ...] = (
    *(by_weights.magnitude, by_weights.l2, by_weights.random, by_weights.bn_scale, by_weights.fpgm, by_weights.lamp),
    *(by_data.taylor, by_data.activation, by_data.apoz, by_data.fisher, by_data.block_fisher, by_data.obd),
)
BUILT_IN: dict[str, Criterion] = {c.__name__: c for c in _ALL}


def resolve(criterion: str | Criterion) -> Criterion:
    """A criterion by name, by ``module:function``, or as it is. Raises SpecError for anything else."""
    found: Criterion = choose(criterion, BUILT_IN, "criterion")
    return found


def gives_losses(criterion: str | Criterion) -> bool:
    """Whether the criterion's scores are rises of the loss (see ``in_loss_units``)."""
    return bool(getattr(resolve(criterion), "in_loss_units", False))


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
    stats = collect(model, graph, getattr(function, "needs", ()), task, seed, wanted)
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


def _label(criterion: str | Criterion) -> str:
    return repr(criterion) if isinstance(criterion, str) else getattr(criterion, "__name__", repr(criterion))


def _require_finite(tensor: Tensor, what: str, advice: str) -> None:
    if not tensor.numel():
        return
    low, high = torch.aminmax(tensor)  # NaN wins in both; no copy of the tensor is made
    if not bool(low.isfinite() & high.isfinite()):
        bad = int((~tensor.isfinite()).sum())
        raise DataError(f"{bad} of {tensor.numel()} values of {what} are NaN or infinite; {advice}")
