"""Channels inside a training: units of the graph's axes are zeroed wherever they show up, and go for good later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from secateur.budget import Budget
from secateur.errors import SpecError
from secateur.graph import analyze
from secateur.graph.graph import Graph
from secateur.plan import Plan
from secateur.planning import assemble, make
from secateur.train.bits import unpack
from secateur.train.choose import Means, Values


@dataclass(eq=False)
class Channels:
    """What is left of the axes' units; once gone, a unit stays gone.

    wishes: the keyword arguments of ``planning.make`` besides the budget.
    """

    model: nn.Module
    graph: Graph
    wishes: Mapping[str, Any]
    kept: Plan | None = None

    def __post_init__(self) -> None:
        for name, tensor in self.model.named_parameters():
            if hasattr(tensor, "placements"):
                raise SpecError(
                    f"processes share {name!r}, and channels are removed whole; prune them before fully_shard"
                )

    def choose(self, values: Values, budget: Budget, means: Means) -> dict[str, Tensor]:
        """Masks of every tensor that loses units. Raises what ``planning.make`` raises."""
        found = make(self.model, self.graph, budget=str(budget), **self.wishes)
        self.take({n: f & self.kept.units[n] if self.kept is not None else f for n, f in found.units.items()}, found)
        return self.masks()

    def take(self, units: Mapping[str, Tensor], like: Plan) -> None:
        """Let these units be what is left."""
        described = (like.pattern, like.budget, dict(like.meta))
        kept = {n: int(flags.sum()) for n, flags in units.items()}
        allocation = replace(like.allocation, kept=kept)
        self.kept = assemble(self.graph, described, allocation, keep={n: f.numpy() for n, f in units.items()})

    def masks(self) -> dict[str, Tensor]:
        """True where a tensor's element stays."""
        return {} if self.kept is None else {name: self.kept.keep(name) for name in self.kept.tensors}

    def plan(self, masks: Mapping[str, Tensor], method: str) -> Plan:
        """What stays, all of it where nothing was chosen yet; with a graph of the model as it is now."""
        kept = self.kept or make(self.model, self.graph, budget="params=100%", **self.wishes)
        now = analyze(self.model, self.graph.inputs)  # the old one holds values from before training
        return replace(kept, meta={**kept.meta, "method": method}, graph=now)

    def restore(self, packed: Mapping[str, Tensor]) -> None:
        """Let the units of a saved state be what is left."""
        dense = make(self.model, self.graph, budget="params=100%", **self.wishes)
        self.take({n: unpack(packed[n].cpu(), f.shape) for n, f in dense.units.items()}, dense)
