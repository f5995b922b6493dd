"""Channels inside a training: units of the graph's axes are zeroed wherever they show up, and go for good later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from secateur.budget import Budget
from secateur.criteria import resolve
from secateur.errors import SpecError
from secateur.graph import analyze
from secateur.graph.graph import Graph
from secateur.plan import Plan
from secateur.planning import Described, assemble, make
from secateur.train.bits import unpack
from secateur.train.choose import Means, Values
from secateur.train.scores import require_data


@dataclass(eq=False)
class Channels:
    """What is left of the axes' units; once gone, a unit stays gone.

    wishes: the keyword arguments of ``planning.make`` besides the budget.
    """

    model: nn.Module
    graph: Graph
    wishes: Mapping[str, Any]
    described: Described
    kept: Plan | None = None

    gathered: ClassVar[frozenset[str]] = frozenset()
    """What the criterion wants of the steps' gradients: nothing, data are asked instead."""

    def __post_init__(self) -> None:
        criterion = self.wishes["criterion"]
        require_data(getattr(resolve(criterion), "needs", ()), criterion, self.wishes["task"])
        for name, tensor in self.model.named_parameters():
            if hasattr(tensor, "placements"):
                raise SpecError(
                    f"processes share {name!r}, and channels are removed whole; prune them before fully_shard"
                )

    def require_reachable(self, budget: Budget) -> None:
        """Raise BudgetError for a budget that the axes cannot meet, whatever is best."""
        make(self.model, self.graph, budget=str(budget), **{**self.wishes, "criterion": "magnitude", "task": None})

    def choose(self, values: Values, budget: Budget, means: Means) -> dict[str, Tensor]:
        """Masks of every tensor that loses units. Raises what ``planning.make`` raises."""
        found = make(self.model, self.graph, budget=str(budget), **self.wishes)
        self.take({n: f & self.kept.units[n] if self.kept is not None else f for n, f in found.units.items()}, found)
        return self.masks()

    def take(self, units: Mapping[str, Tensor], like: Plan) -> None:
        """Let these units be what is left."""
        kept = {n: int(flags.sum()) for n, flags in units.items()}
        allocation = replace(like.allocation, kept=kept)
        self.kept = assemble(self.graph, self.described, allocation, keep={n: f.numpy() for n, f in units.items()})

    def masks(self) -> dict[str, Tensor]:
        """True where a tensor's element stays."""
        return {} if self.kept is None else {name: self.kept.keep(name) for name in self.kept.tensors}

    def plan(self, masks: Mapping[str, Tensor], method: str) -> Plan:
        """What stays, all of it where nothing was chosen yet; with a graph of the model as it is now."""
        pattern, budget, meta = self.described
        now = analyze(self.model, self.graph.inputs)  # the old one holds values from before training
        kept = self.kept or self._dense()
        return replace(kept, pattern=pattern, budget=budget, meta={**meta, "method": method}, graph=now)

    def restore(self, packed: Mapping[str, Tensor] | None) -> None:
        """Let the units of a saved state be what is left. KeyError or ValueError: they are others."""
        if packed is None:
            self.kept = None
            return
        dense = self._dense()
        self.take({n: unpack(packed[n].cpu(), f.shape) for n, f in dense.units.items()}, dense)

    def _dense(self) -> Plan:
        """The plan that keeps everything."""
        plain = {"criterion": "magnitude", "task": None, "allocate": "global"}
        return make(self.model, self.graph, budget="params=100%", **{**self.wishes, **plain})
