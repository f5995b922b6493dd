"""Making the user's own class compute with new sizes: its attributes, and scales that it derives from them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from secateur.apply.attributes import Changes, Sizes, put_, read, search_, sizes, write_
from secateur.apply.blame import Wrong, first_wrong, outputs_of, relative_error
from secateur.apply.demands import demands
from secateur.apply.fold import Fold, fold_, implicit, scaled, usual
from secateur.apply.pretrained import configure, is_pretrained
from secateur.graph.graph import Graph
from secateur.graph.trace import run
from secateur.graph.types import Flags


@dataclass(frozen=True)
class Adapted:
    """What had to change besides slicing tensors: attributes, and tensors multiplied by a factor; or ``why`` not.

    ``unsaved`` says, of a class that ``from_pretrained`` makes, why its configuration cannot hold the new sizes.
    ``equal`` are groups of axes that would have to keep the same part of their units, for a class that fails to work.
    """

    why: str = ""
    attributes: Changes = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)
    unsaved: str = ""
    equal: tuple[tuple[str, ...], ...] = ()


def adapt_(
    small: nn.Module, graph: Graph, alive: Flags, written: fx.GraphModule, inputs: Any, oracle: Any, tolerance: float
) -> Adapted:
    """Make ``small``, whose tensors are sliced already, give the oracle's outputs; on failure it is left as it was.

    written: the rewritten program over the tensors of ``small``; its attention scales may be changed.
    """
    work = _Work(small, graph, alive, written, inputs, oracle, tolerance)
    config = copy.deepcopy(small.config) if is_pretrained(small) else None
    found = work.search_()
    if not found.why and config is not None:
        found = work.configure_(config, found)
    return found


@dataclass(frozen=True, eq=False)
class _Work:
    small: nn.Module
    graph: Graph
    alive: Flags
    written: fx.GraphModule
    inputs: Any
    oracle: Any
    tolerance: float

    def search_(self) -> Adapted:
        """Attributes of the class, and scales that it computes itself."""
        if self.wrong() is None:
            return Adapted()
        fold = self.fold_(implicit)
        if fold is None:
            return Adapted("its attention computes a scale from the width of its heads, which the plan changes")
        expected = outputs_of(self.written, self.inputs)
        found = search_(self.small, self.sizes, self.inputs, self.oracle, expected, self.tolerance)
        if found.why:
            fold.undo_(self.small)
            return Adapted(found.why, equal=demands(self.graph, self.small, found.blamed))
        return Adapted("", found.changes, fold.factors)

    def configure_(self, config: Any, found: Adapted) -> Adapted:
        """The configuration that makes the class with these sizes, where there is one."""
        folds = []

        def fold() -> bool:
            folds.append(self.fold_(usual))
            return folds[0] is not None and bool(folds[0].factors)

        made = configure(
            self.small, config, self.sizes, found.attributes, self.inputs, self.oracle, self.tolerance, fold
        )
        old = {p: {n: read(self.small.get_submodule(p), n) for n in values} for p, values in made.changes.items()}
        write_(self.small, made.changes)
        why = made.why or ("its class computes something else with that configuration" if self.wrong() else "")
        if not why:
            both = {
                p: {**found.attributes.get(p, {}), **made.changes.get(p, {})}
                for p in (*found.attributes, *made.changes)
            }
            factors = folds[0].factors if folds and folds[0] else {}
            return Adapted("", both, {**found.factors, **factors})
        put_(self.small, old)
        if folds and folds[0]:
            folds[0].undo_(self.small)
        return replace(found, unsaved=why)

    @functools.cached_property
    def sizes(self) -> Mapping[str, Sizes]:
        return sizes(self.graph, self.alive)

    def wrong(self) -> Wrong | None:
        return first_wrong(self.small, self.inputs, self.oracle, {}, self.tolerance)

    def fold_(self, asks: Callable[[float | None, int], bool]) -> Fold | None:
        """Scales of attention moved into the weights, none where none has to be; None where that is wrong."""
        narrower = scaled(self.graph, self.alive, self.written, asks)
        if not narrower:
            return Fold({}, {})
        fold = fold_(self.written, narrower, self.graph.weights, self.inputs)
        if fold is not None and not relative_error(run(self.written, self.inputs), self.oracle) <= self.tolerance:
            fold.undo_(self.small)
            return None
        return fold
