"""What calibration data and the network around it say about a weight: only what a criterion asks for.

Everything that is asked for comes from one pass over the calibration split, in evaluation mode. ``gradients`` holds
what is taken from the loss, ``outputs`` what is taken where a weight's outputs come out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from secateur.errors import DataError, SpecError
from secateur.graph.graph import Graph
from secateur.stats import gradients, outputs
from secateur.stats.passes import over
from secateur.tasks import Task

COLLECTED = {
    **gradients.COLLECTED,
    **outputs.COLLECTED,
    "norm_scale": "|gamma| of the batch norm over the outputs that follows, one value each; ones where none does",
}


@dataclass(frozen=True, eq=False)
class Stats:
    """What a criterion may know about one weight: ``stats["grad_abs"]`` and the like, if it was asked for."""

    name: str
    out_dim: int
    seed: int = 0
    values: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def __getitem__(self, what: str) -> Tensor:
        if what not in self.values:
            known = "; ".join(f"{name!r}: {meaning}" for name, meaning in COLLECTED.items())
            raise DataError(f"{what!r} was not collected; declare it: @needs({what!r}). There are {known}")
        return self.values[what]


def collect(
    model: nn.Module,
    graph: Graph,
    needs: Iterable[str],
    task: Task | None = None,
    seed: int = 0,
    names: Iterable[str] | None = None,
) -> dict[str, Stats]:
    """Statistics of every maskable weight, or of those in ``names``.

    The model, its mode, buffers, gradients and flags are left as they were. Raises SpecError for something that cannot
    be collected, DataError where data are needed and there are none, or where they do not fit the model.
    """
    wanted = set(needs)
    if unknown := wanted - COLLECTED.keys():
        raise SpecError(f"no statistic is called {min(unknown)!r}; there are {', '.join(COLLECTED)}")
    places = list(graph.weights) if names is None else list(names)
    values: dict[str, dict[str, Tensor]] = {name: {} for name in places}
    if on_data := wanted - {"norm_scale"}:
        if task is None:
            raise DataError(f"this criterion needs data for {min(on_data)!r}, so give task= with a calibration split")
        values = over(model, graph, places, on_data, task, seed)
    if "norm_scale" in wanted:
        for name in places:
            values[name]["norm_scale"] = _norm_scale(model, graph, name)
    return {name: Stats(name, graph.weights[name].out_dim, seed, values[name]) for name in places}


def _norm_scale(model: nn.Module, graph: Graph, name: str) -> Tensor:
    weight = graph.weights[name]
    outputs = weight.shape[weight.out_dim]
    if weight.norm and model.get_parameter(weight.norm).numel() == outputs:  # or it is over another dimension
        return model.get_parameter(weight.norm).detach().abs()
    return torch.ones(outputs)
