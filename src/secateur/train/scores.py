"""Scores inside a training: any criterion, fed by the training's own gradients where those are what it asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.criteria import Criterion, resolve
from secateur.errors import DataError, SpecError
from secateur.graph.graph import Graph
from secateur.graph.types import Weight
from secateur.stats import Stats, collect
from secateur.tasks import Task
from secateur.train.shards import Group, finite_everywhere

GATHERED: Mapping[str, Callable[[Tensor], Tensor]] = {"grad_abs": torch.abs, "grad_square": torch.square}
"""Statistics that are means over steps of something made of the gradient."""

SPLITTABLE = ("magnitude", "l2", "taylor", "fisher")
"""Built-in criteria that score a weight from itself alone, so that any part of a tensor can be scored alone."""

_NARROW = (torch.float16, torch.bfloat16)  # squares of small weights would all be zero there


@dataclass(frozen=True, eq=False)
class Scorer:
    """A criterion, and where what it asks for comes from."""

    criterion: str | Criterion
    model: nn.Module
    graph: Graph | None
    task: Task | None
    seed: int
    weights: Mapping[str, Weight]
    group: Group | None = None

    def __post_init__(self) -> None:
        if self.elsewhere and self.graph is None:
            raise SpecError(
                f"criterion {self.criterion!r} asks for {min(self.elsewhere)!r}, which takes graph=sc.analyze(model, "
                "inputs), and task= where it comes from data; or choose magnitude or taylor"
            )
        require_data(self.elsewhere, self.criterion, self.task)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(getattr(resolve(self.criterion), "needs", ()))

    @property
    def gathered(self) -> frozenset[str]:
        """What is gathered from the gradients of the steps since the last update."""
        return self.needs & GATHERED.keys()

    @property
    def elsewhere(self) -> frozenset[str]:
        return self.needs - GATHERED.keys()

    def require_splittable(self) -> None:
        """Raise SpecError for a criterion that has to see whole weights."""
        if self.criterion not in SPLITTABLE:
            raise SpecError(
                f"criterion {self.criterion!r} has to see whole weights, and processes share these; "
                f"use {', '.join(SPLITTABLE)}"
            )

    def scores(
        self, values: Mapping[str, Tensor], means: Mapping[str, Mapping[str, Tensor]], names: Iterable[str]
    ) -> dict[str, Tensor]:
        """Scores of what is here of each weight, not below float32.

        Raises DataError, in all processes that share weights, where any are not finite.
        """
        names = list(names)
        function = resolve(self.criterion)
        found: dict[str, Stats] = {}
        if self.elsewhere and self.graph is not None:
            found = collect(self.model, self.graph, self.elsewhere, self.task, self.seed, names)
        scores = {}
        for name in names:
            stats = {**(found[name].values if found else {}), **means.get(name, {})}
            if missing := self.needs - stats.keys():
                raise DataError(f"no gradient of {name!r} was seen for {min(missing)!r} yet")
            value = values[name].float() if values[name].dtype in _NARROW else values[name]
            scores[name] = function(value, Stats(name, self.weights[name].out_dim, self.seed, stats))
        finite = finite_everywhere(scores.values(), self.group)
        for name, good in zip(scores, finite, strict=True):
            if not good:
                raise DataError(f"the scores of {name!r} are not finite; look at the loss and the learning rate")
        return scores


def require_data(needs: Iterable[str], criterion: str | Criterion, task: Task | None) -> None:
    """Raise SpecError where a criterion asks for what comes from data, and there are none."""
    if task is None and (on_data := set(needs) - {"norm_scale"}):
        raise SpecError(f"criterion {criterion!r} asks for {min(on_data)!r}, which comes from data; give task=")
